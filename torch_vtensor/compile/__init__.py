"""SuperScaler: plans for training and inference, behind `torch.compile(model, backend="superscaler")`.

Read backend.py first: it names the phases in order, and each phase is the file of that name.
"""

from torch_vtensor.compile import order
from torch_vtensor.compile.backend import Compilation, superscaler
from torch_vtensor.compile.checkpoint import load_state_dict, state_dict
from torch_vtensor.compile.explanation import Explanation, explain
from torch_vtensor.compile.gradient_norm import clip_grad_norm_
from torch_vtensor.compile.initialization import initialize
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.primitives import (
    Graph,
    Microbatches,
    Tasks,
    balance,
    compile_apart,
    op_assign,
    op_order,
    op_trans,
    store,
)
from torch_vtensor.compile.rules import register_rule
from torch_vtensor.compile.sharded_tensor import ShardedTensor
from torch_vtensor.compile.uncut import Uncut

__all__ = [
    "Compilation",
    "Explanation",
    "Graph",
    "Mesh",
    "Microbatches",
    "ShardedTensor",
    "Tasks",
    "Uncut",
    "balance",
    "clip_grad_norm_",
    "compile_apart",
    "explain",
    "initialize",
    "load_state_dict",
    "op_assign",
    "op_order",
    "op_trans",
    "order",
    "register_rule",
    "state_dict",
    "store",
    "superscaler",
]
