"""VTensorCache in a loop of your own: no enable(), nothing patched.

Look at: `past_key_values=cache` is all there is to it; `crop` takes tokens back, as speculative decoding does, and
copies nothing; `memory()` says where the bytes are.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torch_vtensor import VTensorCache

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
)
model = LlamaForCausalLM(config).to(device).eval()
cache = VTensorCache(config=config)


@torch.no_grad()
def decode(tokens: torch.Tensor, num_new: int) -> torch.Tensor:
    """Read ``tokens`` and continue greedily, over ``cache``; returns the new tokens."""
    new = []
    for _ in range(num_new):
        logits = model(tokens, past_key_values=cache).logits
        tokens = logits[:, -1:].argmax(-1)
        new.append(tokens)
    return torch.cat(new, 1)


prompt = torch.randint(256, (1, 300), device=device)
first = decode(prompt, num_new=200)
address = cache.layers[0].keys.data_ptr()
print(f"{cache.get_seq_length()} tokens: {cache.memory()}")

# Take the last 100 tokens back and say them again: same tokens, written over the old ones at the same address.
cache.crop(-100)
print(f"{cache.get_seq_length()} tokens after crop")
again = decode(first[:, -101:-100], num_new=100)
same = torch.equal(again, first[:, -100:]) and cache.layers[0].keys.data_ptr() == address
print(f"the same 100 tokens, at the same address: {same}")
