"""Tiny random models of many families, built from configurations: what `generate()` is tried on.

Each family keeps something of its own kind in its cache. Weights are drawn wider than for training, so that every
logit depends on every token and a wrong key or value shows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

VOCAB = 96
PROMPT_TOKENS = 130
SHORT_WINDOW = 48  # shorter than the prompt
LONG_WINDOW = 150  # ends between the prompt and the answer
IMAGE_TOKEN = 90

Inputs = dict[str, torch.Tensor]


class Family(NamedTuple):
    """One family's tiny model and what to feed it."""

    make: Callable[[], Any]
    inputs: Callable[[int], Inputs]


VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def prompt(batch: int, tokens: int = PROMPT_TOKENS) -> Inputs:
    """Token ids that repeat themselves, so that prompt lookup finds something."""
    half = torch.randint(3, IMAGE_TOKEN, (batch, tokens // 2), generator=torch.Generator().manual_seed(batch))
    ids = torch.cat([half, half], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def sizes(**changes: Any) -> dict[str, Any]:
    """A decoder's configuration, small."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **changes,
    }


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**sizes(layer_types=kinds, sliding_window=SHORT_WINDOW))
    return transformers.Gemma3ForCausalLM(config)


def _gemma3n() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3nTextConfig(
        **sizes(num_hidden_layers=4, layer_types=kinds, sliding_window=SHORT_WINDOW),
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return transformers.Gemma3nForCausalLM(config)


def _gpt_oss() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.GptOssConfig(
        **sizes(layer_types=kinds, sliding_window=LONG_WINDOW), num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def _deepseek_v3() -> Any:
    config = transformers.DeepseekV3Config(
        **sizes(num_key_value_heads=4, head_dim=8),
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _qwen3_next() -> Any:
    config = transformers.Qwen3NextConfig(
        **sizes(num_hidden_layers=4),
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.Qwen3NextForCausalLM(config)


def _falcon_h1() -> Any:
    config = transformers.FalconH1Config(
        **sizes(), mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16
    )
    return transformers.FalconH1ForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=1024,
        n_embd=32,
        n_layer=3,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, eos_token_id=None, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=1024, init_std=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=2, decoder_attention_heads=2, num_mel_bins=8, max_source_positions=100,
        max_target_positions=448, init_std=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=2, eos_token_id=None, pad_token_id=0
    )
    return transformers.MambaForCausalLM(config)


def _lfm2() -> Any:
    config = transformers.Lfm2Config(
        **sizes(num_hidden_layers=4), layer_types=["conv", "full_attention", "conv", "full_attention"]
    )
    return transformers.Lfm2ForCausalLM(config)


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        projection_dim=32,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**sizes()), image_token_index=IMAGE_TOKEN
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    text = sizes(hidden_size=64, rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]})
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _llava_inputs(batch: int) -> Inputs:
    inputs = prompt(batch)
    inputs["input_ids"][:, 5:21] = IMAGE_TOKEN  # 16 patches
    return inputs | {"pixel_values": _noise(batch, 3, 16, 16)}


def _qwen2_vl_inputs(batch: int) -> Inputs:
    inputs = prompt(batch)
    inputs["input_ids"][:, 5] = IMAGE_TOKEN + 2
    inputs["input_ids"][:, 6:10] = IMAGE_TOKEN  # 4 × 4 patches, merged by 2 × 2
    inputs["input_ids"][:, 10] = IMAGE_TOKEN + 3
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    if VERSION < (5, 1):
        del inputs["mm_token_type_ids"]
    grid = torch.tensor([[1, 4, 4]] * batch)
    return inputs | {"pixel_values": _noise(16 * batch, 3 * 2 * 4 * 4), "image_grid_thw": grid}


def _sound(batch: int) -> Inputs:
    return {"input_features": _noise(batch, 8, 200)}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes())), prompt),
    "mistral-short-window": Family(lambda: _mistral(SHORT_WINDOW), prompt),
    "mistral-long-window": Family(lambda: _mistral(LONG_WINDOW), prompt),
    "gemma3": Family(_gemma3, prompt),
    "gemma3n": Family(_gemma3n, prompt),
    "gpt_oss": Family(_gpt_oss, prompt),
    "mixtral": Family(
        lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes(), num_local_experts=4)), prompt
    ),
    "deepseek_v3": Family(_deepseek_v3, prompt),
    "qwen3_next": Family(_qwen3_next, prompt),
    "falcon_h1": Family(_falcon_h1, prompt),
    "gpt2": Family(_gpt2, prompt),
    "t5": Family(_t5, prompt),
    "bart": Family(_bart, prompt),
    "whisper": Family(_whisper, _sound),
    "mamba": Family(_mamba, prompt),
    "lfm2": Family(_lfm2, prompt),
    "llava": Family(_llava, _llava_inputs),
    "qwen2_vl": Family(_qwen2_vl, _qwen2_vl_inputs),
}


SLIDING = ("mistral-short-window", "mistral-long-window", "gemma3", "gemma3n", "gpt_oss")
"""Some of their layers keep a window of the tokens only."""
STATEFUL = ("qwen3_next", "falcon_h1", "mamba")
"""They keep recurrent states beside keys and values, or instead of them."""
ENCODER_DECODER = ("t5", "bart", "whisper")
VISION = ("llava", "qwen2_vl")
OWN_CACHE = ("qwen3_next", "falcon_h1", "mamba", "lfm2") if VERSION < (5, 1) else ()
"""This transformers version gives them caches of their own, which stay as they are."""


def _mistral(window: int) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes(sliding_window=window)))


@functools.cache
def model_of(family: str) -> Any:
    """The family's model; one a process, because making some takes a second."""
    torch.manual_seed(0)
    model = FAMILIES[family].make().eval()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def assistant_of(family: str) -> Any:
    """A model that guesses what the family's model says, and is right now and then."""
    torch.manual_seed(1)
    assistant = copy.deepcopy(model_of(family))
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    return assistant
