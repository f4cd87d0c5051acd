"""Requests that join and leave a running batch: transformers' own manager, over memory that grows by pages.

Look at: answers come in as they end, each as generate() would have given it alone, and the document that all of them
begin with is computed once. `python -m torch_vtensor serve MODEL` is the same behind an OpenAI-compatible server.
"""

import sys

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

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
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config).to(device).eval()
options = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)
document = torch.randint(1, 256, (400,)).tolist()
prompts = {f"request {index}": [*document, *torch.randint(1, 256, (5 + index,)).tolist()] for index in range(6)}

torch_vtensor.enable(prefix_cache=True)
if torch_vtensor.explain(model)[0].batching != "ours":
    sys.exit("This example needs transformers 5.17 or later")

answers = {}
with model.continuous_batching_context_manager(generation_config=options) as manager:
    for index, (name, prompt) in enumerate(prompts.items()):
        manager.add_request(prompt, request_id=name, max_new_tokens=20 - 3 * index)
        while index == 0 and not answers:  # the others begin with what the first one leaves
            answers |= {output.request_id: output for output in [manager.get_result(timeout=60)] if output}
    while len(answers) < len(prompts):
        output = manager.get_result(timeout=60)
        answers[output.request_id] = output
        print(f"{output.request_id}: {len(output.generated_tokens)} tokens: {output.generated_tokens[:8]} …")

torch_vtensor.disable()
alone = {name: model.generate(torch.tensor([prompt], device=device), options) for name, prompt in prompts.items()}
same = all(
    answers[name].generated_tokens == sequence[0, len(prompts[name]) :].tolist()[: len(answers[name].generated_tokens)]
    for name, sequence in alone.items()
)
counted = torch_vtensor.stats()
print(f"{counted.serving['steps']} steps for {counted.serving['tokens generated']} tokens", counted.prefixes)
print(f"answers are those of generate() alone: {same}")
