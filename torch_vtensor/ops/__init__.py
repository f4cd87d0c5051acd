"""Attention over growing keys and values, as torch operators on plain strided tensors.

``kv_append`` writes the new tokens of all sequences, each at its own length; ``decode_attention`` attends with one or a
few query tokens a sequence, ``prefill_attention`` with many. Lengths are tensors on the device, so one captured graph
or compiled function serves every length. ``implementations`` says who does a call.
"""

from torch_vtensor.ops import library as library  # defines the operators that the functions call
from torch_vtensor.ops.attention_choice import implementations
from torch_vtensor.ops.decode_attention.api import decode_attention
from torch_vtensor.ops.kv_append.api import kv_append
from torch_vtensor.ops.prefill_attention.api import prefill_attention

__all__ = ["decode_attention", "implementations", "kv_append", "prefill_attention"]
