"""Growable memory under generate(): one line before, nothing else changes.

Look at: `enable()`, then the model's own `generate()`. The tokens are DynamicCache's, and no old token is ever copied:
keys and values keep their address while physical pages are mapped behind them as the text grows.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import torch_vtensor

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config).to(device).eval()
prompt = torch.randint(256, (1, 16), device=device)

expected = model.generate(prompt, max_new_tokens=600, do_sample=False)

torch_vtensor.enable()
output = model.generate(prompt, max_new_tokens=600, do_sample=False)

print(f"tokens are DynamicCache's: {torch.equal(output, expected)}")
print(torch_vtensor.explain(model))
print(torch_vtensor.stats())  # the finished sequence's pages are parked: the next one starts with them

print(f"given back to the system: {torch_vtensor.trim():,} bytes")
