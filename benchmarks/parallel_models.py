"""Models for several GPUs, for bench_parallel_plans.py: built whole on each rank, random weights, no dropout.

Their losses are means over all tokens, none of which is ignored: ranks that have as many rows each have losses whose
mean is that of the batch. Llama is wired here from transformers' own layers so that every contender, a pipeline of
torch.distributed.pipelining among them, runs the same modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from plan_models import LLAMA_3_8B, built, decoder_config
from torch import Tensor, nn
from torch.nn import functional as F


class Subject(NamedTuple):
    """A model, a batch, how many tokens that is, and the class of its repeated blocks.

    ``outputs`` of a batch without its last argument are logits, of which and the last argument ``loss`` is a mean.
    """

    model: nn.Module
    outputs: Callable[..., Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    arguments: tuple[Tensor, ...]
    num_tokens: int
    layers: tuple[type[nn.Module], ...]

    def loss_of(self, *arguments: Tensor) -> Tensor:
        """The loss of a batch."""
        *inputs, labels = arguments
        return self.loss(self.outputs(*inputs), labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all tokens, computed in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class Llama(nn.Module):
    """Embedding, layers and head of transformers' Llama; a stage has some of the layers, and what lies at its ends."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.llama import modeling_llama as llama

        self.rotary = llama.LlamaRotaryEmbedding(config)
        self.embed: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleDict(
            {str(index): llama.LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)}
        )
        self.norm: nn.Module | None = llama.LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head: nn.Module | None = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def keep_stage(self, stage: int, num_stages: int) -> None:
        """Forget what other stages of a pipeline do; names stay those of the whole model."""
        size = len(self.layers) // num_stages
        for index in set(range(len(self.layers))) - set(range(stage * size, (stage + 1) * size)):
            del self.layers[str(index)]
        if stage > 0:
            self.embed = None
        if stage < num_stages - 1:
            self.norm = self.head = None

    def forward(self, x: Tensor) -> Tensor:
        """From tokens [B, S], or what the stage before hands on [B, S, D], to logits or what the next one gets."""
        places = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        if self.embed is not None:
            x = self.embed(x)
        positions = self.rotary(x, places)
        for layer in self.layers.values():
            made = layer(x, position_embeddings=positions, attention_mask=None)
            x = made if isinstance(made, Tensor) else made[0]
        return x if self.head is None or self.norm is None else self.head(self.norm(x))


def llama(batch: int, layers: int, device: torch.device, *, tiny: bool = False) -> Subject:
    """Llama-3-8B's shape, sequences of 4,096 tokens."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = decoder_config("llama", layers, LLAMA_3_8B, tiny=tiny)
    config._attn_implementation = "sdpa"
    model = built(lambda: Llama(config), device)
    tokens, labels = torch.randint(config.vocab_size, (2, batch, 16 if tiny else 4096), device=device)
    return Subject(model, model, cross_entropy, (tokens, labels), tokens.numel(), (LlamaDecoderLayer,))


def t5(batch: int, layers: int, device: torch.device, *, tiny: bool = False) -> Subject:
    """T5-large's shape with a vocabulary of 512k, 512 tokens in and 512 out; so many layers in each half."""
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.models.t5.modeling_t5 import T5Block

    config = T5Config(
        vocab_size=512 if tiny else 524_288,
        d_model=32 if tiny else 1024,
        d_kv=8 if tiny else 64,
        d_ff=64 if tiny else 4096,
        num_layers=layers,
        num_heads=4 if tiny else 16,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    model = built(lambda: T5ForConditionalGeneration(config), device)
    tokens, decoded, labels = torch.randint(config.vocab_size, (3, batch, 16 if tiny else 512), device=device)

    def outputs(x: Tensor, y: Tensor) -> Tensor:
        return model(input_ids=x, decoder_input_ids=y, use_cache=False).logits

    return Subject(model, outputs, cross_entropy, (tokens, decoded, labels), 2 * tokens.numel(), (T5Block,))


SUBJECTS = {"llama": llama, "t5": t5}
DEFAULT_BATCH = {"llama": 8, "t5": 32}
DEFAULT_LAYERS = {"llama": 16, "t5": 12}
