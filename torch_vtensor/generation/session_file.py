"""What a session is on disk: a safetensors file that any reader of that format can open.

tokens               [T]              everything said
layers.N.keys        [H, kept, D]     of layer N what its cache kept: all, or a sliding window's last tokens
layers.N.values      [H, kept, D]
(metadata)           the model's settings and sums over its weights, by which it is known again; how many tokens each
                     layer has seen; the messages
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torch_vtensor.generation.modules import modules_of
from torch_vtensor.generation.prefix_cache import adapters_of

__all__ = ["Chat", "Rows", "Saved", "read", "write"]

_FORMAT = "torch_vtensor.Session 2"
_BLOCK = 1 << 14  # integers of 8 bytes that get one sum: so few that a CPU need not share them among threads
_NUM_BLOCKS = {"cpu": 1}  # that are summed at once; elsewhere as many as take 32 MiB
_ODD = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio's bits
# What a config says besides what the model computes: names, versions, defaults of generate() and of what is returned.
_NOT_COMPARED = {"architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "name_or_path",
                 "output_attentions", "output_hidden_states", "pad_token_id", "return_dict", "torch_dtype",
                 "transformers_version", "use_cache"}  # fmt: skip


class Chat(NamedTuple):
    """The messages, how many tokens they tell of, and where in these the answers among them end, by index."""

    messages: list[dict[str, Any]]
    num_tokens: int
    answer_ends: dict[int, int]


class Rows(NamedTuple):
    """What a layer's cache holds: keys and values [1, H, kept, D] of the last of its ``num_tokens`` tokens."""

    keys: torch.Tensor
    values: torch.Tensor
    num_tokens: int


class Saved:
    """A session's file that was found to be the model's."""

    def __init__(self, file: Any, device: torch.device, seen: dict[int, int], chat: Chat) -> None:
        self.tokens: torch.Tensor = file.get_tensor("tokens")
        self.chat = chat
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


def write(path: Path, model: Any, tokens: torch.Tensor, chat: Chat, layers: dict[int, Rows]) -> None:
    """Write a session's file beside ``path`` and put it in its place once it is on disk."""
    tensors = {"tokens": tokens.clone()}
    for index, rows in layers.items():
        for name, tensor in (("keys", rows.keys), ("values", rows.values)):
            kept = tensor[0].clone(memory_format=torch.contiguous_format)  # a layer at a time, where it is
            tensors[f"layers.{index}.{name}"] = kept.cpu()
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(_settings_of(model)),
        "weights": json.dumps(_sums_of(model)),
        "seen": json.dumps({index: rows.num_tokens for index, rows in layers.items()}),
        "chat": json.dumps(chat),
    }
    target = Path(os.path.realpath(path))  # a link stays one
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # with the mode that new files have
    try:
        mode = (target if target.exists() else beside).stat().st_mode & 0o7777
        save_file(tensors, beside, metadata)  # may put another file in its place
        beside.chmod(mode)
        _sync(beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def read(path: Path, model: Any, num_layers: int) -> Iterator[Saved]:
    """Open a session's file.

    Raises: FileNotFoundError; ValueError unless it is a session's, whole, of this model with these weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and no session's file")
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
        try:
            settings, sums = json.loads(metadata["model"]), json.loads(metadata["weights"])
            seen = {int(index): int(count) for index, count in json.loads(metadata["seen"]).items()}
            messages, num_chatted, ends = json.loads(metadata["chat"])
            chat = Chat(messages, num_chatted, {int(index): end for index, end in ends.items()})
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (no mapping)
            num_tokens = {shapes[f"layers.{index}.{name}"][1] for index in seen for name in ("keys", "values")}
            is_whole = len(shapes["tokens"]) == 1 and opened.get_slice("tokens").get_dtype() == "I64"
            is_whole &= max(num_tokens, default=0) <= shapes["tokens"][0]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{path} is a session's file that was changed or damaged: {error!r}") from error
        _check_model(path, model, settings, sums)
        if not is_whole or not all(0 <= index < num_layers for index in seen):
            raise ValueError(f"{path} is a session's file that was changed or damaged: its tensors are of other sizes")
        yield Saved(opened, model.device, seen, chat)


def _check_model(path: Path, model: Any, settings: dict[str, Any], sums: dict[str, Any]) -> None:
    """Refuse a file of another model than ``model``, with what differs."""
    found = _settings_of(model)
    differ = [
        f"{name} {settings[name]} (the model: {found[name]})"
        for name in found
        if name in settings and settings[name] != found[name]  # another version of transformers writes others
    ]
    if differ:
        raise ValueError(f"{path} is of another model: {'; '.join(differ)}. Load it with the model that it is of.")
    now = _sums_of(model)
    changed = sorted(name for name in sums.keys() | now.keys() if sums.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"{path} is of a model with the same sizes and other weights ({len(changed)} of {len(now)} differ, "
            f"{changed[0]} for one): its keys and values are not this one's. Load it with those weights, or say its "
            "tokens anew."
        )


def _settings_of(model: Any) -> dict[str, Any]:
    """What keys and values depend on besides weights, as json has it."""
    config = model.config.get_text_config(decoder=True).to_dict()
    settings = {"class": type(model).__name__, "dtype": str(model.dtype), "adapters": adapters_of(modules_of(model))}
    settings |= {name: value for name, value in config.items() if name not in _NOT_COMPARED and name[0] != "_"}
    told: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return told


@torch.no_grad()
def _sums_of(model: Any) -> dict[str, int]:
    """Of each weight a sum over all of its bits: of 8 bytes each, read as an integer, times a number of their place's.

    Modulo 2**64, and the numbers are odd: what differs in 8 bytes has another sum, what differs in more as good as.
    """
    sums: dict[str, torch.Tensor] = {}
    factors = _mixed(torch.arange(_BLOCK, device=model.device)) | 1
    for name, tensor in model.state_dict().items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel():
            continue
        octets = tensor.detach().reshape(-1).view(torch.uint8)
        if len(octets) % 8 or octets.storage_offset() % 8:
            octets = torch.nn.functional.pad(octets, (0, -len(octets) % 8)).clone()
        words = octets.view(torch.int64)
        while name not in sums or len(words) > 1:
            words = sums[name] = torch.cat([*_block_sums(words, factors)])
    told = torch.cat(list(sums.values())).tolist() if sums else []
    return dict(zip(sums, told, strict=True))


def _block_sums(words: torch.Tensor, factors: torch.Tensor) -> Iterator[torch.Tensor]:
    for part in words.split(_BLOCK * _NUM_BLOCKS.get(factors.device.type, 256)):
        on_device = part.to(factors.device)
        num_whole = len(part) // _BLOCK * _BLOCK
        yield (on_device[:num_whole].view(-1, _BLOCK) * factors).sum(1)
        if num_whole < len(part):
            yield (on_device[num_whole:] * factors[: len(part) - num_whole]).sum()[None]


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Other numbers, without a pattern, the same everywhere."""
    for _ in range(2):
        numbers = (numbers + 1) * _ODD
        numbers = numbers ^ (numbers >> 31)
    return numbers
