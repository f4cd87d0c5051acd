"""A byte-level Llama, trained by `torch.compile(model, backend="superscaler")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from torch_vtensor.demo.text import VOCABULARY

__all__ = ["make_model", "train"]

_CONTEXT_TOKENS = 8192
_HEAD_DIM = 64
_NUM_BLOCKS = 1
_BLOCK_TOKENS = 512
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 25


def make_model(num_layers: int, hidden_size: int) -> LlamaForCausalLM:
    """A Llama with random weights that reads and writes bytes."""
    num_heads = 2 * hidden_size // _HEAD_DIM
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=_HEAD_DIM,
        max_position_embeddings=_CONTEXT_TOKENS,
        initializer_range=hidden_size**-0.5,  # weights this large learn much faster in a model this small
        rope_theta=100.0,  # every angle is seen within a training block, so that texts can be longer than one
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, tokens: torch.Tensor, num_steps: int, codegen: str | None) -> None:
    """Train ``model`` in place on random parts of ``tokens`` [T], behind a progress bar that shows the loss.

    Args:
        codegen: the backend's option of that name; None: inductor, or, where it cannot generate code, eager, with the
            reason shown.
    """
    tokens = tokens.to(next(model.parameters()).device)
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP_STEPS, 1 - step / num_steps)
    )
    compiled = _compile(model, codegen or "inductor")
    with tqdm(range(num_steps), desc="compiling", unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            batch_BT = _sample(tokens)
            try:
                loss = compiled(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
            except RuntimeError as error:
                if codegen is not None or step > 0:
                    raise
                bar.write(f"inductor generates no code here, so operators run one by one: {_first_line(error)}")
                compiled = _compile(model, "eager")
                loss = compiled(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_description("training")
            bar.set_postfix(loss=f"{loss.item():.2f}")


def _compile(model: nn.Module, codegen: str) -> Callable[..., Any]:
    return torch.compile(model, backend="superscaler", options={"codegen": codegen})


def _sample(tokens: torch.Tensor) -> torch.Tensor:
    """A batch [B, T] of runs out of ``tokens`` from random places."""
    starts = torch.randint(len(tokens) - _BLOCK_TOKENS, (_NUM_BLOCKS, 1))
    return tokens[(starts + torch.arange(_BLOCK_TOKENS)).to(tokens.device)]


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
