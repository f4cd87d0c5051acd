"""Best of n over one document: a Session reads it once, its forks answer, the likeliest answer goes on.

Look at: four answers cost little more memory than one, since a fork shares the pages of all that was said before; and
the next turn runs the new tokens alone. Nothing is patched: no enable().
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torch_vtensor import Session, stats

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
model = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()
document, question = torch.randint(256, (3000,)), torch.randint(256, (20,))


def answer(session: Session) -> float:
    """Have one branch answer the question; returns how likely the model finds what it said."""
    output = session.generate(
        question, max_new_tokens=48, do_sample=True, return_dict_in_generate=True, output_logits=True
    )
    log_probs = torch.stack(output.logits, 1).log_softmax(-1)
    return log_probs.gather(-1, output.sequences[:, -48:, None]).mean().item()


with Session(model) as session:
    session.generate(document, max_new_tokens=1)
    alone = session.memory().committed_bytes
    branches = session.fork(4)
    scores = [answer(branch) for branch in branches]
    for number, (branch, score) in enumerate(zip(branches, scores, strict=True), 1):
        memory = branch.memory()
        own = memory.committed_bytes - memory.shared_bytes
        print(f"branch {number}: log-probability {score:.3f}, {branch.length} tokens, {own:,} bytes of its own")
    (pool,) = stats().devices.values()
    print(f"five sessions hold {pool.live_bytes:,} bytes; the document's alone held {alone:,}")

best = branches.pop(max(range(4), key=scores.__getitem__))
for branch in branches:
    branch.close()
num_cached = best.num_cached
best.generate(torch.randint(256, (10,)), max_new_tokens=16)
print(f"the best goes on: {num_cached} of its {best.length} tokens were not run again")
