"""What a session is on disk: a safetensors file that any reader of that format can open.

tokens               [T]              everything said
layers.N.keys        [H, kept, D]     of layer N what its cache kept: all, or a sliding window's last tokens
layers.N.values      [H, kept, D]
sample               [S]              a few numbers of each of the model's weights, by which it is known again
(metadata)           the model's sizes, how many tokens each layer has seen, the messages
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["Rows", "Saved", "read", "write"]

_FORMAT = "torch_vtensor.Session 1"
_SAMPLED = 8  # numbers a weight
_TOLERANCE = 1e-5  # tables of frequencies differ in their last bits between devices
_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
          "vocab_size", "sliding_window", "layer_types", "kv_lora_rank", "qk_rope_head_dim")  # fmt: skip


class Rows(NamedTuple):
    """What a layer's cache holds: keys and values [1, H, kept, D] of the last of its ``num_tokens`` tokens."""

    keys: torch.Tensor
    values: torch.Tensor
    num_tokens: int


class Saved:
    """A session's file that was found to be the model's."""

    def __init__(self, file: Any, device: torch.device, seen: dict[int, int], messages: list[dict[str, Any]]) -> None:
        self.tokens: torch.Tensor = file.get_tensor("tokens")
        self.messages = messages
        self.layers = sorted(seen)
        self._file = file
        self._device = device
        self._seen = seen

    def rows(self, layer: int) -> Rows:
        """What one layer's cache held, on the model's device."""
        keys, values = (
            self._file.get_tensor(f"layers.{layer}.{name}")[None].to(self._device) for name in ("keys", "values")
        )
        return Rows(keys, values, self._seen[layer])


def write(
    path: Path, model: Any, tokens: torch.Tensor, messages: list[dict[str, Any]], layers: dict[int, Rows]
) -> None:
    """Write a session's file beside ``path`` and put it in its place once it is on disk."""
    tensors = {"tokens": tokens.clone(), "sample": _sample(model)}
    for index, rows in layers.items():
        for name, tensor in (("keys", rows.keys), ("values", rows.values)):
            kept = tensor[0].clone(memory_format=torch.contiguous_format)  # a layer at a time, where it is
            tensors[f"layers.{index}.{name}"] = kept.cpu()
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(_sizes_of(model)),
        "seen": json.dumps({index: rows.num_tokens for index, rows in layers.items()}),
        "messages": json.dumps(messages),
    }
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        save_file(tensors, name, metadata)
        os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def read(path: Path, model: Any, num_layers: int) -> Iterator[Saved]:
    """Open a session's file.

    Raises: FileNotFoundError; ValueError unless it is a session's, whole, of this model with these weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is no session's file, or is cut short: {error}") from error
    with file as opened:
        metadata = opened.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is a safetensors file of format {metadata.get('format')!r}, and Session.load reads {_FORMAT!r}"
            )
        saved, found = json.loads(metadata["model"]), _sizes_of(model)
        differ = [
            f"{name} {saved.get(name)} (the model: {found[name]})" for name in found if saved.get(name) != found[name]
        ]
        if differ:
            raise ValueError(f"{path} is of another model: {'; '.join(differ)}. Load it with the model that it is of.")
        before, now = opened.get_tensor("sample"), _sample(model)
        if before.shape != now.shape or not torch.allclose(before, now, _TOLERANCE, _TOLERANCE**2, equal_nan=True):
            raise ValueError(
                f"{path} is of a model with the same sizes and other weights: its keys and values are not this one's. "
                "Load it with those weights, or say its tokens anew."
            )
        seen = {int(index): count for index, count in json.loads(metadata["seen"]).items()}
        assert all(index < num_layers for index in seen), "a model of the same sizes has as many layers"
        yield Saved(opened, model.device, seen, json.loads(metadata["messages"]))


def _sizes_of(model: Any) -> dict[str, Any]:
    """What keys and values depend on, as json has it."""
    config = model.config.get_text_config(decoder=True)
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    told: dict[str, Any] = json.loads(json.dumps(sizes | {"class": type(model).__name__, "dtype": str(model.dtype)}))
    return told


@torch.no_grad()
def _sample(model: Any) -> torch.Tensor:
    """A few numbers of each weight and table of the model: others, with as good as certainty, if it is another."""
    parts = [torch.zeros(1, dtype=torch.float64, device=model.device)]
    for group in (model.named_parameters(), model.named_buffers()):
        for _, tensor in group:
            if tensor.numel() and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                flat = tensor.reshape(-1)[:: max(tensor.numel() // _SAMPLED, 1)]
                parts.append(flat[:_SAMPLED].to(model.device, torch.float64))
    return torch.cat(parts).cpu()
