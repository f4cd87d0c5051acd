"""What the operators ask of their arguments, checked on the host from shapes, dtypes and devices alone."""

from __future__ import annotations

import torch

__all__ = ["check_attention", "check_cache", "check_no_gradient", "check_per_sequence"]


def check_cache(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Keys [B, H, C, D] and values [B, H, C, Dv] of one dtype and device, whose rows are contiguous."""
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"keys have shape {_shape(keys)} and values {_shape(values)}; they must be [B, H, C, D] and [B, H, C, Dv] "
            "with the same B, H and C"
        )
    _check_alike(keys, values, "keys", "values")
    _check_rows_contiguous(keys, "keys")
    _check_rows_contiguous(values, "values")


def check_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    first: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> None:
    """The rules that both attention operators share.

    Raises: TypeError for a dtype, ValueError for anything else that does not fit.
    """
    check_cache(keys, values)
    batch, heads, _, dim = keys.shape
    if query.dim() != 4 or query.shape[0] != batch or query.shape[3] != dim:
        raise ValueError(
            f"query has shape {_shape(query)} and keys {_shape(keys)}; query must be [B, Hq, T, D] with the keys' B "
            f"{batch} and D {dim}"
        )
    if heads == 0 or query.shape[1] % heads:
        raise ValueError(
            f"query has {query.shape[1]} heads and keys have {heads}; the first must be a multiple of the second: "
            "query head h reads key/value head h // (Hq // H)"
        )
    _check_alike(query, keys, "query", "keys")
    _check_rows_contiguous(query, "query")
    if lengths is not None:
        check_per_sequence(lengths, "lengths", keys)
    if first is not None:
        check_per_sequence(first, "first", keys)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it counts the token itself: pass at least 1, or None for no window")
    if sinks is not None:
        if tuple(sinks.shape) != (query.shape[1],) or sinks.device != query.device:
            raise ValueError(
                f"sinks have shape {_shape(sinks)} on {sinks.device}; they must be one logit a query head, "
                f"[{query.shape[1]}], on {query.device}"
            )
        if not sinks.is_floating_point():
            raise TypeError(f"sinks are {sinks.dtype}; they are logits: pass a floating dtype")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None for no cap")


def check_per_sequence(counts: torch.Tensor, name: str, keys: torch.Tensor) -> None:
    """A count for each sequence: [B], integers, where the keys are."""
    if counts.dtype is not torch.int32 and counts.dtype is not torch.int64:
        raise TypeError(f"{name} are {counts.dtype}; pass torch.int32 or torch.int64")
    if tuple(counts.shape) != (keys.shape[0],) or counts.device != keys.device:
        raise ValueError(
            f"{name} have shape {_shape(counts)} on {counts.device}; they must be [{keys.shape[0]}], one for each "
            f"sequence of the keys, on {keys.device}"
        )


def check_no_gradient(op: str, remedy: str, *tensors: torch.Tensor | None) -> None:
    """Refuse a call whose result would silently have no gradient."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{op} has no gradient here, and an argument requires one: {remedy}")


def _check_alike(one: torch.Tensor, other: torch.Tensor, one_name: str, other_name: str) -> None:
    if one.device != other.device:
        raise ValueError(f"{one_name} are on {one.device} and {other_name} on {other.device}; move them to one device")
    if one.dtype != other.dtype:
        raise TypeError(f"{one_name} are {one.dtype} and {other_name} {other.dtype}; convert them to one dtype")
    if not one.is_floating_point():
        raise TypeError(f"{one_name} are {one.dtype}; pass a floating dtype")


def _check_rows_contiguous(tensor: torch.Tensor, name: str) -> None:
    if tensor.stride(3) != 1 and tensor.shape[3] > 1:
        raise ValueError(
            f"{name} have strides {tuple(tensor.stride())}; the last must be 1 (others are free): call .contiguous()"
        )


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
