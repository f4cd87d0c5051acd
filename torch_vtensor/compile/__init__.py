"""SuperScaler: plans for training and inference, behind `torch.compile(model, backend="superscaler")`.

Read backend.py first: it names the phases in order, and each phase is the file of that name.
"""

from torch_vtensor.compile import order
from torch_vtensor.compile.backend import Compilation, superscaler
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.primitives import (
    Graph,
    Microbatches,
    Tasks,
    balance,
    op_assign,
    op_order,
    op_trans,
)
from torch_vtensor.compile.rules import register_rule
from torch_vtensor.compile.uncut import Uncut

__all__ = [
    "Compilation",
    "Graph",
    "Mesh",
    "Microbatches",
    "Tasks",
    "Uncut",
    "balance",
    "op_assign",
    "op_order",
    "op_trans",
    "order",
    "register_rule",
    "superscaler",
]
