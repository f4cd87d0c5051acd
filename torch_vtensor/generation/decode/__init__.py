"""Compiled decoding: generate()'s loop as two captured graphs a token, over caches that go on growing.

loop.py           the loop that stands for transformers' own: take up the prompt, then replay until done
support.py        what the loop can do, and why it leaves a call to transformers
program.py        one batch size of one model as captured graphs, kept for the next call
prompt_graphs.py  captured parts of prompts
prompt_parts.py   what stands between the matrix products of prompts, compiled
graphs.py         inductor's code and captured graphs
prompt.py         how a prompt is cut into parts of a few sizes
step.py           how a model runs one step over rows at addresses
pieces.py         layers of a traced step that are alike, compiled once
fuse.py           what surrounds the matrix products of a traced step, moved into them
sampling.py       from logits to the next token, on the device
"""
