"""The demo from start to end, as it is told on the terminal."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import torch_vtensor
from torch_vtensor.demo import branches, compare, picture, text, train
from torch_vtensor.demo.scale import Scale
from torch_vtensor.settings import MIB

__all__ = ["tell"]

_PROMPT = "The Python language "
_WARM_TOKENS = 8
_BRANCH_TOKENS = 40


def tell(scale: Scale, device: torch.device, folder: Path, seed: int) -> str | None:
    """Run the demo, printing what happens; model, text and pictures go to ``folder``.

    Returns: None if our tokens are DynamicCache's, else where they differ.
    Raises:  OutOfPagesError where memory runs out.
    """
    start = time.perf_counter()
    disable_progress_bar()  # transformers' own, of files that are written in an instant
    torch.manual_seed(seed)
    _train(scale, device, folder / "model")
    model = _load(folder / "model", device)
    dynamic, vtensor, static = _generate(model, scale.num_tokens, seed)

    generated = _PROMPT + text.decode(vtensor.tokens)
    (folder / "text.txt").write_text(generated, encoding="utf-8")
    print(f"\n{generated}\n")
    print(compare.format_table([dynamic, vtensor, static]))
    print(_remarks(model, vtensor, static))
    title = f"KV memory of one sequence while {scale.num_tokens} tokens are generated on {device.type}"
    picture.draw(folder / "memory.png", title, dynamic, vtensor, static)
    print(f"\npicture: {folder / 'memory.png'}\n")
    _branch(model, scale, folder / "branches.png", seed)
    print(f"model, text and pictures are in {folder}; the demo took {time.perf_counter() - start:.0f} s")
    if vtensor.tokens != dynamic.tokens:
        return _difference(vtensor.tokens, dynamic.tokens)
    print("next: torch_vtensor.enable() before generate() in a program of yours, or: python examples/branches.py")
    return None


def _train(scale: Scale, device: torch.device, folder: Path) -> None:
    model = train.make_model(scale.num_layers, scale.hidden_size).to(device)
    tokens = text.encode(text.read_text())
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"training a Llama of {millions:.1f} million parameters on {device}, on {len(tokens):,} bytes of Python's help"
    )
    print('  torch.compile(model, backend="superscaler"); the first step compiles', flush=True)
    train.train(model, tokens, scale.num_steps, scale.codegen)
    model.save_pretrained(folder)


def _load(folder: Path, device: torch.device) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    print(f"saved, and loaded from {folder}; torch_vtensor.explain(model):\n{torch_vtensor.explain(model)}")
    return model


def _generate(model: PreTrainedModel, num_tokens: int, seed: int) -> list[compare.Run]:
    """The same text over every kind of cache, each warm, and starting without memory."""
    prompt = text.encode(_PROMPT)[None].to(model.device)
    capacity = prompt.shape[1] + num_tokens
    runs = []
    for contender in (compare.DYNAMIC, compare.VTENSOR, compare.STATIC):
        print(f"generating {num_tokens} tokens over {contender.name}", flush=True)
        compare.generate(model, contender, prompt, _WARM_TOKENS, seed, capacity)
        torch_vtensor.trim()
        runs.append(compare.generate(model, contender, prompt, num_tokens, seed, capacity))
        if contender is compare.VTENSOR:
            freed_bytes = torch_vtensor.trim()
            left_bytes = sum(pool.committed_bytes for pool in torch_vtensor.stats().devices.values())
            print(f"  trim() afterwards gave {freed_bytes / MIB:.2f} MiB back; {left_bytes / MIB:.2f} MiB are left")
    return runs


def _branch(model: PreTrainedModel, scale: Scale, path: Path, seed: int) -> None:
    """Sessions that continue one document, each in its own way."""
    print(f"a Session reads {scale.num_document} tokens; {scale.num_branches} forks of it go on from there", flush=True)
    grown = branches.grow(model, scale.num_document, scale.num_branches, _BRANCH_TOKENS, seed)
    print(branches.format_branches(grown))
    picture.draw_branches(path, f"{scale.num_branches} branches over a document of {scale.num_document} tokens", grown)
    print(f"\npicture: {path}")


def _remarks(model: PreTrainedModel, vtensor: compare.Run, static: compare.Run) -> str:
    calls = vtensor.num_driver_calls
    context = model.config.max_position_embeddings
    capacity = static.steps[-1].num_tokens + 1
    context_mib = static.steps[-1].memory.held_bytes / capacity * context / MIB
    remarks = [
        "MiB peak: while DynamicCache grows, torch.cat holds the old and the new tensor",
        f"driver calls: torch_vtensor made none in {calls.count(0)} of {len(calls)} steps",
        f"StaticCache was made for exactly these {capacity} tokens; for the model's context of {context} it holds "
        f"{context_mib:.2f} MiB",
    ]
    load, num_cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > num_cores + 1:
        remarks.append(f"the machine is busy (load {load:.1f} on {num_cores} cores): the times say little")
    return "\n".join(remarks)


def _difference(ours: list[int], reference: list[int]) -> str:
    place = next(index for index, (our, other) in enumerate(zip(ours, reference, strict=True)) if our != other)
    return (
        f"token {place} of {len(ours)} is {ours[place]} over torch_vtensor but {reference[place]} over DynamicCache; "
        "they must be identical. Please report this with the output of `python -m torch_vtensor info`."
    )
