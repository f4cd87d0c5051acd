"""Compiled decoding: generate()'s loop as two captured graphs a token, over caches that go on growing.

loop.py       the loop that stands for transformers' own: prefill, then replay until done
support.py    what the loop can do, and why it leaves a call to transformers
program.py    one batch size of one model as captured graphs, kept for the next call
step.py       how a model runs one step over rows at addresses
linear.py     small-batch matrix products of the traced step
sampling.py   from logits to the next token, on the device
"""
