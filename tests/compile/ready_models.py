"""Tiny models of the families that ready plans are for: deterministic, in fp64, captured once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from virtual import Captures, capture_call

VOCABULARY = 40


@dataclass(frozen=True)
class Example:
    """A model, its loss as a function of a batch of four, and how exactly it computes that."""

    model: nn.Module
    loss_of: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    tolerance: float = 1e-9


@cache
def captured(make: Callable[[], Example], cuts_classes: bool) -> tuple[Example, Captures]:
    example = make()
    return example, capture_call(example.loss_of, *example.arguments, cuts_classes=cuts_classes)


def gpt2(num_layers: int = 2) -> Example:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=num_layers, n_head=4, n_positions=16, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1
    )
    model = _prepared(transformers.GPT2LMHeadModel(config))

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return Example(model, loss_of, _tokens())


def deep_gpt2() -> Example:
    return gpt2(num_layers=4)


def llama(tied: bool = False) -> Example:
    """Two heads of keys for four of queries; norms and rotations are computed in fp32."""
    model = _prepared(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=VOCABULARY,
                tie_word_embeddings=tied,
            )
        )
    )
    return Example(model, lambda x, y: model(input_ids=x, labels=y, use_cache=False).loss, _tokens(), 1e-5)


def tied_llama() -> Example:
    return llama(tied=True)


def t5() -> Example:
    """A vocabulary that weighs more than the layers; its heads share a bias over all layers."""
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, vocab_size=512
    )
    model = _prepared(transformers.T5ForConditionalGeneration(config))
    return Example(model, lambda x, y: model(input_ids=x, labels=y, use_cache=False).loss, _tokens(), 1e-5)


def swin() -> Example:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5
    )
    model = _prepared(transformers.SwinForImageClassification(config))
    batch = _normal(4, 3, 32, 32), torch.tensor([1, 3, 0, 2])
    return Example(model, lambda image, label: model(pixel_values=image, labels=label).loss, batch)


class Block(nn.Module):
    """AlphaFold 2's trunk in brief: attention within rows biased by pairs, transition, outer product, triangles.

    Legend: B batch, S sequences, R residues, M and Z features of the two representations.
    """

    def __init__(self, m: int = 16, z: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm_m, self.norm_z, self.norm_t = nn.LayerNorm(m), nn.LayerNorm(z), nn.LayerNorm(z)
        self.q, self.k, self.v, self.gate, self.out = (nn.Linear(m, m, bias=False) for _ in range(5))
        self.bias = nn.Linear(z, heads, bias=False)
        self.transition = nn.Sequential(nn.LayerNorm(m), nn.Linear(m, 4 * m), nn.ReLU(), nn.Linear(4 * m, m))
        self.left, self.right, self.outer = nn.Linear(m, 4), nn.Linear(m, 4), nn.Linear(16, z)
        self.a, self.b, self.c = (nn.Linear(z, z) for _ in range(3))

    def forward(self, msa_BSRM: Tensor, pair_BRRZ: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm_m(msa_BSRM)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in (self.q, self.k, self.v))
        bias = self.bias(self.norm_z(pair_BRRZ)).permute(0, 3, 1, 2).unsqueeze(1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias, dim=-1)
        attended = (weights @ v).transpose(-2, -3).flatten(-2)
        msa_BSRM = msa_BSRM + self.out(torch.sigmoid(self.gate(x)) * attended)
        msa_BSRM = msa_BSRM + self.transition(msa_BSRM)
        outer = torch.einsum("bsic,bsjd->bijcd", self.left(msa_BSRM), self.right(msa_BSRM)) / msa_BSRM.shape[1]
        pair_BRRZ = pair_BRRZ + self.outer(outer.flatten(-2))
        y = self.norm_t(pair_BRRZ)
        return msa_BSRM, pair_BRRZ + self.c(torch.einsum("bikc,bjkc->bijc", self.a(y), self.b(y)))


class Evoformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, msa_BSRM: Tensor, pair_BRRZ: Tensor) -> Tensor:
        for block in self.blocks:
            msa_BSRM, pair_BRRZ = block(msa_BSRM, pair_BRRZ)
        return msa_BSRM.square().mean() + pair_BRRZ.square().mean()


class Recycling(nn.Module):
    """Goes through its blocks three times, each time from what the last one made, and learns from the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm_m, self.norm_z = nn.LayerNorm(16), nn.LayerNorm(8)

    def forward(self, msa_BSRM: Tensor, pair_BRRZ: Tensor) -> Tensor:
        m, z = torch.zeros_like(msa_BSRM), torch.zeros_like(pair_BRRZ)
        for number in range(3):
            with torch.set_grad_enabled(number == 2):
                m, z = msa_BSRM + self.norm_m(m), pair_BRRZ + self.norm_z(z)
                for block in self.blocks:
                    m, z = block(m, z)
        return m.square().mean() + z.square().mean()


def recycling() -> Example:
    model = _prepared(Recycling())
    return Example(model, lambda msa, pair: model(msa, pair), (_normal(4, 3, 5, 16), _normal(4, 5, 5, 8)))


def evoformer() -> Example:
    model = _prepared(Evoformer())
    return Example(model, lambda msa, pair: model(msa, pair), (_normal(4, 3, 5, 16), _normal(4, 5, 5, 8)))


def _tokens() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(2, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :3] = -100
    return tokens, labels


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def _prepared(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.double().eval()
