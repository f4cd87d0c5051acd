"""A conversation that branches: a fork shares the pages of everything said so far.

Look at: `shared` in the printed memory. Three answers continue one long history; each costs what it adds, not another
copy of the history. Writing in one branch never shows in another: a shared page is copied before it is written.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torch_vtensor import VTensorCache, stats

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=64,
    max_position_embeddings=8192,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config).to(device).eval()


def say(history: torch.Tensor, cache: VTensorCache, num_words: int) -> torch.Tensor:
    """One turn: the user adds random tokens, the model answers; returns the conversation so far."""
    turn = torch.randint(256, (1, num_words), device=device)
    return model.generate(torch.cat([history, turn], 1), past_key_values=cache, max_new_tokens=64, do_sample=True)


def show(name: str, cache: VTensorCache) -> None:
    """Where the bytes of one cache are."""
    memory = cache.memory()
    print(f"{name:<12} {memory.written_bytes:>10,} written {memory.committed_bytes:>10,} committed", end=" ")
    print(f"{memory.shared_bytes:>10,} shared with other branches")


cache = VTensorCache(config=config)
history = torch.empty(1, 0, dtype=torch.long, device=device)
for turn in range(3):
    history = say(history, cache, num_words=300 if turn else 1500)
    show(f"turn {turn + 1}", cache)

branches = [cache.fork() for _ in range(3)]
for index, branch in enumerate(branches):
    say(history, branch, num_words=20)
    show(f"branch {index + 1}", branch)

(pool,) = stats().devices.values()
apart = sum(each.memory().committed_bytes for each in [cache, *branches])
print(f"four conversations hold {pool.live_bytes:,} bytes; apart they would hold {apart:,}")
