"""Which sequences of a store have their first tokens in the same pages, so that attention reads those once for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_vtensor.generation.kv_store import KVStore

__all__ = ["SharedPrefix", "SharedTables", "shared_prefixes", "table_shape", "tables_of"]

_SHARES_READS = {"cuda"}
"""Devices whose kernels read a prefix once for all slots that share it."""
_LEAST_SAVED_BYTES = 8 * 2**20  # of one layer: two more launches cost about as much as reading this


class SharedPrefix(NamedTuple):
    """Slots whose first ``num_tokens`` tokens lie in the same pages."""

    slots: tuple[int, ...]
    num_tokens: int


class SharedTables(NamedTuple):
    """Prefixes as ``decode_attention`` takes them: groups [G, K], -1 behind a row's last slot, and num_shared [B]."""

    groups: torch.Tensor
    num_shared: torch.Tensor


def shared_prefixes(store: KVStore, most_tokens: int) -> tuple[SharedPrefix, ...]:
    """The prefixes that are worth being read once, of at most ``most_tokens`` tokens."""
    if store.shape.device.type not in _SHARES_READS:
        return ()
    found = (SharedPrefix(slots, min(tokens, most_tokens)) for slots, tokens in store.shared_prefixes())
    return tuple(
        one for one in found if (len(one.slots) - 1) * one.num_tokens * store.shape.token_bytes >= _LEAST_SAVED_BYTES
    )


def table_shape(prefixes: Sequence[SharedPrefix]) -> tuple[int, int] | None:
    """[G, K] of a table that has room for these prefixes, rounded up so that few shapes serve; None for no prefixes."""
    if not prefixes:
        return None
    num_groups, num_members = len(prefixes), max(len(one.slots) for one in prefixes)
    return 1 << (num_groups - 1).bit_length(), 1 << (num_members - 1).bit_length()


def tables_of(prefixes: Sequence[SharedPrefix], batch: int) -> SharedTables:
    """The tables on the CPU, of ``table_shape``."""
    shape = table_shape(prefixes)
    assert shape is not None
    groups, counts = torch.full(shape, -1, dtype=torch.int32, device="cpu"), [0] * batch
    for row, prefix in enumerate(prefixes):
        groups[row, : len(prefix.slots)] = torch.tensor(prefix.slots, device="cpu")
        for slot in prefix.slots:
            counts[slot] = prefix.num_tokens
    return SharedTables(groups, torch.tensor(counts, dtype=torch.int32, device="cpu"))
