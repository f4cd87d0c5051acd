"""Tiny models of the families that plans are made for, as functions of their inputs, and captured."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from torch_vtensor.compile.capture import capture
from torch_vtensor.compile.names import name_inputs
from torch_vtensor.compile.task_graph import OperatorGraph

Program = tuple[Callable[..., Any], tuple[Tensor, ...]]

_SMALL: dict[str, Any] = {"vocab_size": 40, "use_cache": False}
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_LLAMA |= {"num_key_value_heads": 2}


def _tokens() -> Tensor:
    return torch.randint(2, 40, (2, 8), generator=torch.Generator().manual_seed(0))


def _language_model(model: nn.Module) -> Program:
    model.train()
    return (lambda tokens: model(input_ids=tokens, labels=tokens).loss), (_tokens(),)


def gpt2() -> Program:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=16, **_SMALL)
    model = transformers.GPT2LMHeadModel(config).train()

    def loss(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens).logits
        return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 40), tokens[:, 1:].reshape(-1))

    return loss, (_tokens(),)


def llama() -> Program:
    return _language_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, **_SMALL)))


def qwen3() -> Program:
    return _language_model(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=8, **_LLAMA, **_SMALL)))


def bert() -> Program:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, **_SMALL
    )
    return _language_model(transformers.BertForMaskedLM(config))


def t5() -> Program:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, **_SMALL
    )
    return _language_model(transformers.T5ForConditionalGeneration(config))


def mbart() -> Program:
    sizes = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("ffn_dim", 48), ("layers", 1))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.MBartConfig(
        d_model=32, max_position_embeddings=32, pad_token_id=1, **sizes, **heads, **_SMALL
    )
    # In training it drops layers by a random number, on which no one program can be captured.
    model = transformers.MBartForConditionalGeneration(config).eval()

    def loss(tokens: Tensor, decoder_tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens, decoder_input_ids=decoder_tokens).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=1)

    return loss, (_tokens(), _tokens())


def swin() -> Program:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return _classifier(transformers.SwinForImageClassification(config), 32)


def vit() -> Program:
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=5,
    )
    return _classifier(transformers.ViTForImageClassification(config), 16)


def _classifier(model: nn.Module, size: int) -> Program:
    model.train()
    labels = torch.tensor([1, 3])
    return (lambda image, label: model(pixel_values=image, labels=label).loss), (torch.randn(2, 3, size, size), labels)


def resnet() -> Program:
    """Convolutions, batch statistics and pooling."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=4),
        nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return (lambda image, label: nn.functional.cross_entropy(model(image), label)), (
        torch.randn(2, 3, 8, 8),
        torch.tensor([1, 3]),
    )


class Evoformer(nn.Module):
    """One block of AlphaFold 2's trunk: row attention with pair bias, transition, outer product mean, triangles.

    Legend: S sequences, R residues, M and Z features of the two representations.
    """

    def __init__(self, m: int = 16, z: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm_m, self.norm_z, self.norm_t = nn.LayerNorm(m), nn.LayerNorm(z), nn.LayerNorm(z)
        self.qkv, self.bias, self.gate, self.out = (
            nn.Linear(m, 3 * m, bias=False), nn.Linear(z, heads, bias=False), nn.Linear(m, m), nn.Linear(m, m),
        )  # fmt: skip
        self.transition = nn.Sequential(nn.LayerNorm(m), nn.Linear(m, 4 * m), nn.ReLU(), nn.Linear(4 * m, m))
        self.left, self.right, self.outer = nn.Linear(m, 4), nn.Linear(m, 4), nn.Linear(16, z)
        self.a, self.b, self.gate_t, self.out_t = (nn.Linear(z, z) for _ in range(4))

    def forward(self, msa_SRM: Tensor, pair_RRZ: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm_m(msa_SRM)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in self.qkv(x).chunk(3, -1))
        bias = self.bias(self.norm_z(pair_RRZ)).permute(2, 0, 1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias, dim=-1)
        attended = (weights @ v).transpose(-2, -3).flatten(-2)
        msa_SRM = msa_SRM + self.out(torch.sigmoid(self.gate(x)) * attended)
        msa_SRM = msa_SRM + self.transition(msa_SRM)
        outer = torch.einsum("sic,sjd->ijcd", self.left(msa_SRM), self.right(msa_SRM)) / msa_SRM.shape[0]
        pair_RRZ = pair_RRZ + self.outer(outer.flatten(-2))
        y = self.norm_t(pair_RRZ)
        product = torch.einsum("ikc,jkc->ijc", torch.sigmoid(self.a(y)) * y, self.b(y))
        return msa_SRM, pair_RRZ + torch.sigmoid(self.gate_t(y)) * self.out_t(product)


def evoformer() -> Program:
    block = Evoformer()

    def loss(msa_SRM: Tensor, pair_RRZ: Tensor) -> Tensor:
        for _ in range(2):  # recycling
            msa_SRM, pair_RRZ = block(msa_SRM, pair_RRZ)
        return msa_SRM.square().mean() + nn.functional.mse_loss(pair_RRZ, torch.zeros_like(pair_RRZ))

    return loss, (torch.randn(3, 5, 16), torch.randn(5, 5, 8))


MODELS = (gpt2, llama, qwen3, bert, t5, mbart, swin, vit, resnet, evoformer)


def captured(program: Program) -> OperatorGraph:
    """The program's one graph, as capture gives it to plans."""
    graphs: list[OperatorGraph] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, example_inputs, name_inputs(gm, example_inputs)).graph)
        return gm.forward

    function, inputs = program
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    (graph,) = graphs
    return graph
