"""Whose memory a thread's caches take, and whose prefixes its calls of generate() find."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["current_salt", "prefix_salt"]

_salt: ContextVar[Hashable] = ContextVar("torch_vtensor salt", default=None)


def current_salt() -> Hashable:
    """The salt of the innermost ``prefix_salt`` block of this thread or task; None outside of them."""
    return _salt.get()


@contextmanager
def prefix_salt(salt: Hashable) -> Iterator[None]:
    """Keep a tenant apart: what is generated in this block never begins with what was computed outside of it.

    Blocks with an equal salt share their prefixes. Pages of caches that moved to pages in the block are overwritten
    with zeros before others get them; caches smaller than a page are torch's memory, which is not. Holds for the
    calling thread, or asyncio task: a thread that is started in the block needs a block of its own, or
    ``contextvars.copy_context().run``.

    Raises: TypeError for a salt that cannot be hashed.
    """
    hash(salt)
    token = _salt.set(salt)
    try:
        yield
    finally:
        _salt.reset(token)
