"""Models that need memory, for bench_plans.py: built on the device, random weights, no dropout.

Legend: B batch, S sequences, R residues, M and Z features of the two representations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Shape(NamedTuple):
    """Sizes of a decoder with gated perceptrons: vocabulary, features, hidden features, heads, heads of keys."""

    vocabulary: int
    width: int
    hidden: int
    heads: int
    kv_heads: int


QWEN3_1_7B = Shape(151_936, 2048, 6144, 16, 8)
LLAMA_3_8B = Shape(128_256, 4096, 14_336, 32, 8)
TINY = Shape(512, 32, 64, 4, 2)


def decoder_config(kind: str, layers: int, shape: Shape, *, tiny: bool = False, **more: Any) -> Any:
    """transformers' configuration of a decoder of some layers, without a cache; of a tiny one to see that it runs."""
    from transformers import AutoConfig

    sizes = TINY if tiny else shape
    return AutoConfig.for_model(
        kind,
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.width // sizes.heads,
        use_cache=False,
        **more,
    )


class Subject(NamedTuple):
    """A model, its loss as a function of a batch, a batch, and how many tokens (or images, residues) that is.

    ``layer`` is the class of its repeated blocks, what full checkpointing checkpoints.
    """

    model: nn.Module
    loss_of: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    num_tokens: int
    layer: type[nn.Module]


def qwen3(batch: int, layers: int, device: torch.device, *, tiny: bool = False) -> Subject:
    """Qwen3-1.7B's shape (28 layers), sequences of 2,048 tokens, transformers' own loss."""
    from transformers import Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    length = 16 if tiny else 2048
    config = decoder_config("qwen3", layers, QWEN3_1_7B, tiny=tiny, tie_word_embeddings=True)
    model = built(lambda: Qwen3ForCausalLM(config), device)
    tokens = torch.randint(config.vocab_size, (batch, length), device=device)
    return Subject(model, lambda x: model(input_ids=x, labels=x).loss, (tokens,), tokens.numel(), Qwen3DecoderLayer)


def swin(batch: int, layers: int, device: torch.device, *, tiny: bool = False) -> Subject:
    """Swin-L at 768 × 768 pixels; `layers` are those of its third stage, 18."""
    from transformers import SwinConfig, SwinForImageClassification
    from transformers.models.swin.modeling_swin import SwinLayer

    config = SwinConfig(
        image_size=32 if tiny else 768,
        patch_size=4,
        embed_dim=16 if tiny else 192,
        depths=[2, layers] if tiny else [2, 2, layers, 2],
        num_heads=[2, 4] if tiny else [6, 12, 24, 48],
        window_size=4 if tiny else 12,
        drop_path_rate=0.0,
        num_labels=1000,
    )
    model = built(lambda: SwinForImageClassification(config), device)
    images = torch.randn(batch, 3, config.image_size, config.image_size, device=device, dtype=torch.bfloat16)
    labels = torch.randint(1000, (batch,), device=device)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(pixel_values=x).logits.float(), y)

    return Subject(model, loss_of, (images, labels), batch, SwinLayer)


def evoformer(batch: int, layers: int, device: torch.device, *, tiny: bool = False) -> Subject:
    """AlphaFold 2's Evoformer at the sizes of its initial training: 128 sequences of 256 residues, 48 blocks."""
    sequences, residues = (4, 6) if tiny else (128, 256)
    m, z = (16, 8) if tiny else (256, 128)
    model = built(lambda: Evoformer(layers, m, z), device)
    msa = torch.randn(batch, sequences, residues, m, device=device, dtype=torch.bfloat16)
    pair = torch.randn(batch, residues, residues, z, device=device, dtype=torch.bfloat16)

    def loss_of(msa: Tensor, pair: Tensor) -> Tensor:
        msa, pair = model(msa, pair)
        return msa.float().square().mean() + pair.float().square().mean()

    return Subject(model, loss_of, (msa, pair), batch * residues, Block)


SUBJECTS = {"qwen3": qwen3, "swin": swin, "evoformer": evoformer}
DEFAULT_BATCH = {"qwen3": 16, "swin": 16, "evoformer": 4}
DEFAULT_LAYERS = {"qwen3": 28, "swin": 18, "evoformer": 8}


def built(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Make a model in bfloat16 on a device, with the same random weights in every process."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return make().train()
    finally:
        torch.set_default_dtype(torch.float32)


class Attention(nn.Module):
    """Gated attention along the last dimension but one, with a bias from the pairs."""

    def __init__(self, width: int, heads: int, pair: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.gate, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            *(nn.Linear(width, width) for _ in range(2)),
        )
        self.bias = None if pair is None else nn.Sequential(nn.LayerNorm(pair), nn.Linear(pair, heads, bias=False))

    def forward(self, x: Tensor, pair_BRRZ: Tensor | None = None) -> Tensor:
        """x [B, N, R, width] attends over R."""
        x = self.norm(x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.bias is not None:
            assert pair_BRRZ is not None
            scores = scores + self.bias(pair_BRRZ).permute(0, 3, 1, 2).unsqueeze(1)
        attended = (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
        return self.out(torch.sigmoid(self.gate(x)) * attended)


class Triangle(nn.Module):
    """The triangular update by multiplication, along outgoing or incoming edges."""

    def __init__(self, width: int, equation: str) -> None:
        super().__init__()
        self.equation = equation
        self.norm, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.a, self.b, self.gate_a, self.gate_b, self.gate, self.out = (nn.Linear(width, width) for _ in range(6))

    def forward(self, pair_BRRZ: Tensor) -> Tensor:
        x = self.norm(pair_BRRZ)
        a, b = torch.sigmoid(self.gate_a(x)) * self.a(x), torch.sigmoid(self.gate_b(x)) * self.b(x)
        return torch.sigmoid(self.gate(x)) * self.out(self.norm_out(torch.einsum(self.equation, a, b)))


def transition(width: int) -> nn.Module:
    """A perceptron four times as wide."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """One block of the Evoformer (AlphaFold 2, supplement, algorithm 6)."""

    def __init__(self, m: int, z: int) -> None:
        super().__init__()
        self.rows, self.columns, self.transition_m = Attention(m, 8, z), Attention(m, 8, None), transition(m)
        self.norm, self.left, self.right = nn.LayerNorm(m), nn.Linear(m, 32), nn.Linear(m, 32)
        self.outer = nn.Linear(32 * 32, z)
        self.outgoing, self.incoming = Triangle(z, "bikc,bjkc->bijc"), Triangle(z, "bkic,bkjc->bijc")
        self.starting, self.ending, self.transition_z = Attention(z, 4, z), Attention(z, 4, z), transition(z)

    def forward(self, msa_BSRM: Tensor, pair_BRRZ: Tensor) -> tuple[Tensor, Tensor]:
        msa_BSRM = msa_BSRM + self.rows(msa_BSRM, pair_BRRZ)
        msa_BSRM = msa_BSRM + self.columns(msa_BSRM.transpose(1, 2)).transpose(1, 2)
        msa_BSRM = msa_BSRM + self.transition_m(msa_BSRM)
        x = self.norm(msa_BSRM)
        outer = torch.einsum("bsic,bsjd->bijcd", self.left(x), self.right(x)) / x.shape[1]
        pair_BRRZ = pair_BRRZ + self.outer(outer.flatten(-2))
        pair_BRRZ = pair_BRRZ + self.outgoing(pair_BRRZ)
        pair_BRRZ = pair_BRRZ + self.incoming(pair_BRRZ)
        pair_BRRZ = pair_BRRZ + self.starting(pair_BRRZ, pair_BRRZ)
        flipped = pair_BRRZ.transpose(1, 2)
        pair_BRRZ = pair_BRRZ + self.ending(flipped, flipped).transpose(1, 2)
        return msa_BSRM, pair_BRRZ + self.transition_z(pair_BRRZ)


class Evoformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, layers: int, m: int, z: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(m, z) for _ in range(layers))

    def forward(self, msa_BSRM: Tensor, pair_BRRZ: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            msa_BSRM, pair_BRRZ = block(msa_BSRM, pair_BRRZ)
        return msa_BSRM, pair_BRRZ
