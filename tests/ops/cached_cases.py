"""Cases of cached_attention: attention's, with the rows' last tokens still to be written, and a rotation perhaps."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import AttentionCase

CASES = [
    AttentionCase(lengths=(33, 1, 70), dtype=torch.float32, room=5),
    AttentionCase(lengths=(70, 40), dims=(16, 32), heads=1, group=5, num_rows=3, window=20, first=(0, 9), room=2),
    AttentionCase(lengths=(50, 51), dims=(32, 32), has_sinks=True, softcap=5.0, layout="token_major", room=1),
    AttentionCase(lengths=(130,), heads=1, group=8, dtype=torch.float16, layout="interleaved"),
    AttentionCase(lengths=(40, 300, 7), window=16, first=(0, 250, 0), scale=0.3, room=9),
]
PROMPTS = [
    AttentionCase(lengths=(40, 24, 90), dims=(32, 32), group=4, num_rows=24, first=(3, 0, 70), room=2),
    AttentionCase(
        lengths=(50, 70), dims=(32, 16), group=5, num_rows=40, window=9, has_sinks=True, layout="token_major"
    ),
    AttentionCase(lengths=(140, 131), heads=1, dims=(24, 24), num_rows=130, softcap=5.0, layout="interleaved", room=3),
    AttentionCase(lengths=(60, 5, 33), dims=(64, 64), num_rows=16, num_new=(1, 5, 16), layout="interleaved", room=4),
    AttentionCase(lengths=(200, 70), dims=(64, 64), num_rows=130, num_new=(129, 7), window=20),
]
"""Many new tokens a sequence, as in a prompt; in some of them only a part of the rows are tokens."""


def addressed(tensor: torch.Tensor) -> torch.Tensor:
    """Each slot's address, for rows [B, H, C, D]."""
    slot_bytes = tensor.stride(0) * tensor.itemsize
    slots = [tensor.data_ptr() + slot * slot_bytes for slot in range(tensor.shape[0])]
    return torch.tensor(slots, device=tensor.device)


SHARED = [
    (AttentionCase(lengths=(70, 90, 66), dims=(16, 16), heads=1, room=3), ((0, 1, 2),), (65, 65, 65)),
    (AttentionCase(lengths=(40, 180, 150, 33), dims=(16, 32), first=(4, 0, 0, 4), layout="token_major"),
     ((2, 1), (3, 0)), (32, 140, 140, 32)),
    (AttentionCase(lengths=(20, 300, 290), heads=1, dims=(64, 64), group=8, has_sinks=True, softcap=4.0),
     ((1, 2),), (0, 280, 280)),
]  # fmt: skip
"""Cases, groups of slots that begin with the same tokens, and how many of a slot's tokens those are."""


class CachedCall:
    """A call of cached_attention: the last rows of every sequence are arguments, and NaN in memory until written."""

    def __init__(self, case: AttentionCase, device: str, has_rotation: bool = False) -> None:
        self.case = case
        self.given = case.arguments(device)
        keys, values, query = self.given["keys"], self.given["values"], self.given["query"]
        self.counts = case.num_new or (case.num_rows,) * len(case.lengths)
        self.new = tuple(
            rows.new_full((*rows.shape[:2], case.num_rows, rows.shape[3]), float("nan")) for rows in (keys, values)
        )
        self.expected = keys.clone(), values.clone()
        for slot, (length, count) in enumerate(zip(case.lengths, self.counts, strict=True)):
            for new, rows in zip(self.new, (keys, values), strict=True):
                new[slot, :, :count] = rows[slot, :, length - count : length]
                rows[slot, :, length - count : length] = float("nan")
        self.query, self.key, self.rotation = query, self.new[0], None
        if has_rotation:
            angles = torch.linspace(0.0, 3.0, case.num_rows * case.dims[0] // 2, device=device)
            angles = angles.view(1, case.num_rows, -1).repeat(1, 1, 2)
            # Turning back what is then turned gives the case's own query and keys, up to one rounding.
            self.query = turned(query, angles.cos(), -angles.sin())
            self.key = turned(self.new[0], angles.cos(), -angles.sin())
            self.rotation = angles.cos().to(case.dtype), angles.sin().to(case.dtype)

    def arguments(self) -> tuple[Any, ...]:
        """In the operator's order. The addresses among them are good for as long as this object lives."""
        given, keys, values = self.given, self.given["keys"], self.given["values"]
        counts = torch.tensor(self.counts, dtype=torch.int32, device=self.query.device)
        lengths = given["lengths"].int() - counts
        firsts = torch.zeros_like(lengths) if given["first"] is None else given["first"].int()
        scale = self.case.dims[0] ** -0.5 if self.case.scale is None else self.case.scale
        return (
            self.query, self.key, self.new[1], addressed(keys), addressed(values), lengths, firsts, given["sinks"],
            *self.workspace(), 0, 0, *keys.stride()[1:3], *values.stride()[1:3], scale, self.case.window,
            self.case.softcap, *(self.rotation or (None, None)), None if self.case.num_new is None else counts,
        )  # fmt: skip

    def launch_prompt(self, num_sms: int | None = None) -> torch.Tensor:
        """The call by the kernel for prompts, with that many multiprocessors to fill."""
        from torch_vtensor.ops.attention_triton import Rows
        from torch_vtensor.ops.prefill_attention.triton import launch_rows

        query, key, value, key_addresses, value_addresses, lengths, firsts, sinks, *_, num_new = self.arguments()
        keys, values, case = self.given["keys"], self.given["values"], self.case
        rows = Rows((0, *keys.stride()[1:3]), (0, *values.stride()[1:3]), key_addresses, value_addresses)
        return launch_rows(
            query, query, query, rows, lengths, case.heads, case.dims[1], num_new, firsts, case.scale, case.window,
            sinks, case.softcap, new=(key, value), num_sms=num_sms,
        )  # fmt: skip

    def workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.query.device
        if device.type != "cuda":
            return torch.zeros(0), torch.zeros(0, dtype=torch.int32)
        from torch_vtensor.ops.decode_attention.triton import make_workspace

        return make_workspace(len(self.case.lengths), self.case.heads, self.case.dims[1], device)

    def share(
        self, groups: tuple[tuple[int, ...], ...], num_shared: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give all slots of a group the first one's rows; returns the tables of the operator."""
        table = torch.full((len(groups) + 1, 4), -1, dtype=torch.int32)
        for row, slots in enumerate(groups):
            table[row, : len(slots)] = torch.tensor(slots)
            for rows in (self.given["keys"], self.given["values"]):
                rows[list(slots), :, : num_shared[slots[0]]] = rows[slots[0], :, : num_shared[slots[0]]].clone()
        counts = torch.tensor(num_shared, dtype=torch.int32)
        return table.to(self.query.device), counts.to(self.query.device)

    def forget(self, groups: tuple[tuple[int, ...], ...], num_shared: tuple[int, ...]) -> None:
        """NaN in what the slots of a group share, but for the first one's."""
        for slots in groups:
            for rows in (self.given["keys"], self.given["values"]):
                rows[list(slots[1:]), :, : num_shared[slots[0]]] = float("nan")

    def check(self, out: torch.Tensor) -> None:
        """The result is attention's; the new rows are written as they are, and nothing else changed."""
        for slot, count in enumerate(self.counts):
            out[slot, :, count:] = 0.0
        self.case.check(out)
        for rows, expected in zip((self.given["keys"], self.given["values"]), self.expected, strict=True):
            assert torch.equal(rows.isnan(), expected.isnan())
            assert torch.equal(rows.nan_to_num(), expected.nan_to_num())

    def check_rotated(self, out: torch.Tensor, unrotated: torch.Tensor) -> None:
        """As without a rotation, up to the rounding of what was turned there and back."""
        rounding = 16 * torch.finfo(self.case.dtype).eps
        torch.testing.assert_close(out, unrotated, rtol=rounding, atol=rounding)
        torch.testing.assert_close(self.given["keys"], self.expected[0], rtol=rounding, atol=rounding, equal_nan=True)
        assert torch.equal(self.given["values"].nan_to_num(), self.expected[1].nan_to_num())


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of halves."""
    first, second = x.float().chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
