"""Ready plans, one a file, each a function that `options={"plan": …}` takes; by_name.py puts them together.

layers.py finds what they cut in a model, placing.py says how they compose.
"""

from torch_vtensor.compile.plans.accumulate import accumulate
from torch_vtensor.compile.plans.by_name import NamedPlan, cuts_classes, named
from torch_vtensor.compile.plans.chunked_loss import chunked_loss
from torch_vtensor.compile.plans.coshard import coshard
from torch_vtensor.compile.plans.data_parallel import data_parallel
from torch_vtensor.compile.plans.gpipe import gpipe
from torch_vtensor.compile.plans.interlaced import interlaced
from torch_vtensor.compile.plans.interleaved import interleaved
from torch_vtensor.compile.plans.layerwise import layerwise
from torch_vtensor.compile.plans.one_f_one_b import one_f_one_b
from torch_vtensor.compile.plans.recompute import recompute
from torch_vtensor.compile.plans.recycling import three_f_one_b
from torch_vtensor.compile.plans.sequence_parallel import sequence_parallel
from torch_vtensor.compile.plans.single_device import single_device
from torch_vtensor.compile.plans.tensor_parallel import tensor_parallel
from torch_vtensor.compile.plans.zero import zero1, zero2, zero3
from torch_vtensor.compile.plans.zero_bubble import zero_bubble, zero_bubble_h2

__all__ = [
    "NamedPlan",
    "accumulate",
    "chunked_loss",
    "coshard",
    "cuts_classes",
    "data_parallel",
    "gpipe",
    "interlaced",
    "interleaved",
    "layerwise",
    "named",
    "one_f_one_b",
    "recompute",
    "sequence_parallel",
    "single_device",
    "tensor_parallel",
    "three_f_one_b",
    "zero1",
    "zero2",
    "zero3",
    "zero_bubble",
    "zero_bubble_h2",
]
