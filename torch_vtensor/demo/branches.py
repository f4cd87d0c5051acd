"""Several branches of one conversation over a document: what each session holds, shared and of its own.

document    [ page ][ page ][ page ][ page ]                 run once
branch 1    [ page ][ page ][ page ][ own  ]                 the same pages, and what it said itself
branch 2    [ page ][ page ][ page ][ own  ][ own ]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

import torch_vtensor
from torch_vtensor.demo import text
from torch_vtensor.settings import MIB

__all__ = ["Branches", "Held", "format_branches", "grow"]

_OPENINGS = (
    "\n\nIn short, ",
    "\n\nFor example, ",
    "\n\nNote that ",
    "\n\nOtherwise, ",
    "\n\nThe class ",
    "\n\nWhen a ",
)


class Held(NamedTuple):
    """What one session's cache holds; of the committed bytes, ``shared_bytes`` are other sessions' as well."""

    name: str
    num_tokens: int
    committed_bytes: int
    shared_bytes: int
    said: str


class Branches(NamedTuple):
    """Every session of the conversation, and the bytes that all of them take together."""

    sessions: list[Held]
    together_bytes: int

    @property
    def apart_bytes(self) -> int:
        """What they would take if each had a copy of its own."""
        return sum(held.committed_bytes for held in self.sessions)


def grow(model: PreTrainedModel, num_document: int, num_branches: int, num_new: int, seed: int) -> Branches:
    """Have ``model`` read a document once, and continue it in ``num_branches`` ways."""
    torch.manual_seed(seed)
    torch_vtensor.trim()
    document = torch_vtensor.Session(model)
    document.generate(text.encode(text.read_text())[:num_document], max_new_tokens=1, do_sample=False, pad_token_id=0)
    branches = document.fork(num_branches)
    said = []
    for branch, opening in zip(branches, _openings(num_branches), strict=True):
        answer = branch.generate(
            text.encode(opening), max_new_tokens=num_new, do_sample=True, temperature=0.7, pad_token_id=0
        )
        said.append(opening.strip() + " " + text.decode(answer))
    sessions = [
        _held("document", document, ""),
        *(_held(f"branch {i + 1}", branch, said[i]) for i, branch in enumerate(branches)),
    ]
    together_bytes = torch_vtensor.stats().devices[model.device].live_bytes
    for session in [document, *branches]:
        session.close()
    return Branches(sessions, together_bytes)


def format_branches(branches: Branches) -> str:
    """One row a session, and what they take together against copies."""
    rows = [["", "tokens", "MiB", "shared", "its own", "  said"]]
    for held in branches.sessions:
        sizes = (held.committed_bytes, held.shared_bytes, held.committed_bytes - held.shared_bytes)
        said = " ".join(held.said.split())
        rows.append([held.name, f"{held.num_tokens:,}", *(f"{size / MIB:.2f}" for size in sizes), f"  {said:.48}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:5], widths[1:5]), row[5]]).rstrip() for row in rows
    ]
    together, apart = branches.together_bytes / MIB, branches.apart_bytes / MIB
    return "\n".join([*lines, f"together {together:.2f} MiB; with copies of their own {apart:.2f} MiB"])


def _held(name: str, session: torch_vtensor.Session, said: str) -> Held:
    memory = session.memory()
    return Held(name, session.length, memory.committed_bytes, memory.shared_bytes, said)


def _openings(count: int) -> Sequence[str]:
    return [_OPENINGS[index % len(_OPENINGS)] for index in range(count)]
