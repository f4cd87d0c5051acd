"""How large the demo is."""

from typing import NamedTuple

__all__ = ["FULL", "QUICK", "Scale"]


class Scale(NamedTuple):
    """Sizes of the model, of its training and of the texts. ``codegen`` None: inductor, if it can."""

    num_layers: int
    hidden_size: int
    num_steps: int
    num_tokens: int
    codegen: str | None
    num_document: int
    num_branches: int


FULL = Scale(
    num_layers=3, hidden_size=256, num_steps=250, num_tokens=2000, codegen=None, num_document=2048, num_branches=6
)
QUICK = Scale(
    num_layers=2, hidden_size=128, num_steps=4, num_tokens=300, codegen="eager", num_document=600, num_branches=3
)
"""Hardly trained, and just long enough for pages: it shows that everything works."""
