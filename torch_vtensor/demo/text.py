"""Real text that every Python installation has: the language reference behind `help()`, one token a byte."""

import re
from collections.abc import Iterable

import torch

__all__ = ["VOCABULARY", "decode", "encode", "read_text"]

VOCABULARY = 256


def read_text() -> str:
    """About 430 KB of English and of Python, without rulers and tables, which are easier to learn than either."""
    from pydoc_data.topics import topics

    lines = "\n\n".join(topics[name] for name in sorted(topics)).splitlines()
    return "\n".join(line for line in lines if not re.match(r"\s*([|+]|(\W)\2{3})", line))


def encode(text: str) -> torch.Tensor:
    """The bytes of ``text`` as tokens [T]."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def decode(tokens: Iterable[int]) -> str:
    """The text of byte tokens; what is no text, or would steer a terminal, becomes a dot."""
    text = bytes(tokens).decode(errors="replace")
    return "".join(char if char.isprintable() or char == "\n" else "·" for char in text)
