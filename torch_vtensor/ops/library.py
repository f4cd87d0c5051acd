"""The operators' schemas, what they return without running, and which implementation runs where.

The public functions in ``<op>/api.py`` check arguments and call these; so do graphs that torch.compile made of them.
A device's implementation is imported when it is first used: importing this imports no triton.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from torch_vtensor.ops import attention_cuda
from torch_vtensor.ops.decode_attention.cpu import decode_attention as _decode_attention_cpu
from torch_vtensor.ops.kv_append.cpu import kv_append as _kv_append_cpu
from torch_vtensor.ops.prefill_attention import autograd
from torch_vtensor.ops.prefill_attention.cpu import prefill_attention as _prefill_attention_cpu

__all__ = ["NAMESPACE"]

NAMESPACE = "torch_vtensor"

_SCHEMAS = (
    "kv_append(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor lengths, Tensor? num_new=None)"
    " -> ()",
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor? lengths=None, Tensor? first=None,"
    " float? scale=None, SymInt? window=None, Tensor? sinks=None, float? softcap=None, SymInt? split_tokens=None,"
    " str? implementation=None, Tensor? groups=None, Tensor? num_shared=None) -> Tensor",
    "prefill_attention(Tensor query, Tensor keys, Tensor values, Tensor? lengths=None, Tensor? num_new=None,"
    " Tensor? first=None, float? scale=None, SymInt? window=None, Tensor? sinks=None, float? softcap=None,"
    " bool causal=True, str? implementation=None) -> Tensor",
    "prefill_attention_backward(Tensor grad, Tensor query, Tensor keys, Tensor values, Tensor? lengths=None,"
    " Tensor? first=None, float? scale=None, SymInt? window=None, Tensor? sinks=None, float? softcap=None,"
    " bool causal=True) -> (Tensor, Tensor, Tensor, Tensor)",
)
# A cache's strides are its own: a compiler must hand it over as it is, never copy it into a tidier layout.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library(NAMESPACE, "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=_TAGS)


def _kv_append_cuda(*arguments: Any) -> None:
    """Imported when it is called, as triton is."""
    importlib.import_module("torch_vtensor.ops.kv_append.triton").launch(*arguments)


_library.impl("kv_append", _kv_append_cpu, "CPU")
_library.impl("decode_attention", _decode_attention_cpu, "CPU")
_library.impl("prefill_attention", _prefill_attention_cpu, "CPU")
_library.impl("kv_append", _kv_append_cuda, "CUDA")
_library.impl("decode_attention", attention_cuda.decode_attention, "CUDA")
_library.impl("prefill_attention", attention_cuda.prefill_attention, "CUDA")
_library.impl("prefill_attention_backward", autograd.backward, "CompositeExplicitAutograd")


def _kv_append_fake(*arguments: torch.Tensor | None) -> None:
    return None


def _attention_fake(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *arguments: Any) -> torch.Tensor:
    batch, query_heads, num_rows, _ = query.shape
    return query.new_empty(batch, num_rows, query_heads, values.shape[3]).transpose(1, 2)


def _prefill_attention_backward_fake(
    grad: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    query_grad, keys_grad, values_grad = (query.new_empty(tensor.shape) for tensor in (query, keys, values))
    return query_grad, keys_grad, values_grad, autograd.empty_sinks_grad(query)


torch.library.register_fake(f"{NAMESPACE}::kv_append", _kv_append_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::decode_attention", _attention_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::prefill_attention", _attention_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::prefill_attention_backward", _prefill_attention_backward_fake, lib=_library)
torch.library.register_autograd(
    f"{NAMESPACE}::prefill_attention", autograd.backward_of_call, setup_context=autograd.save_call, lib=_library
)
