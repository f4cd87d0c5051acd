"""Which sequences of a store have their first tokens in the same pages, so that attention reads those once for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from torch_vtensor.generation.kv_store import KVStore

__all__ = [
    "MOST_GROUPS",
    "SharedPrefix",
    "SharedTables",
    "shared_prefixes",
    "shares_reads",
    "table_shape",
    "tables_of",
    "worth_sharing",
]

_SHARES_READS = {"cuda"}
"""Devices whose kernels read a prefix once for all slots that share it."""
MOST_GROUPS = 4  # in tables of a fixed shape: each has programs started for it, whether there is such a group or not
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
    if not shares_reads(store.shape.device):
        return ()
    found = (SharedPrefix(slots, min(tokens, most_tokens)) for slots, tokens in store.shared_prefixes())
    return worth_sharing(found, store.shape.token_bytes)


def shares_reads(device: torch.device) -> bool:
    """Whether kernels of this device read a prefix once for all who share it."""
    return device.type in _SHARES_READS


def worth_sharing(prefixes: Iterable[SharedPrefix], token_bytes: int) -> tuple[SharedPrefix, ...]:
    """Those which save more reading than it costs to read them by themselves; a token has so many bytes in a layer."""
    return tuple(one for one in prefixes if (len(one.slots) - 1) * one.num_tokens * token_bytes >= _LEAST_SAVED_BYTES)


def table_shape(batch: int) -> tuple[int, int]:
    """[G, K] of tables for so many slots that serve whatever they share, the most valuable groups of it."""
    return max(1, min(MOST_GROUPS, batch // 2)), batch


def tables_of(prefixes: Sequence[SharedPrefix], batch: int, shape: tuple[int, int] | None = None) -> SharedTables:
    """The tables on the CPU, by default no larger than these prefixes need; in fewer rows, of those that save most."""
    if shape is None:
        shape = len(prefixes), max(len(one.slots) for one in prefixes)
    groups, counts = torch.full(shape, -1, dtype=torch.int32, device="cpu"), [0] * batch
    by_value = sorted(prefixes, key=lambda one: (len(one.slots) - 1) * one.num_tokens, reverse=True)
    for row, prefix in enumerate(by_value[: shape[0]]):
        groups[row, : len(prefix.slots)] = torch.tensor(prefix.slots, device="cpu")
        for slot in prefix.slots:
            counts[slot] = prefix.num_tokens
    return SharedTables(groups, torch.tensor(counts, dtype=torch.int32, device="cpu"))
