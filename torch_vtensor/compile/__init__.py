"""SuperScaler: plans for training and inference, behind `torch.compile(model, backend="superscaler")`.

Read backend.py first: it names the phases in order, and each phase is the file of that name.
"""

from torch_vtensor.compile.backend import Compilation, superscaler
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.primitives import Graph, Tasks, op_assign

__all__ = ["Compilation", "Graph", "Mesh", "Tasks", "op_assign", "superscaler"]
