"""Continuous batching: transformers' generate_batch() and serve, over sequences at addresses of their own.

manager.py      what init_continuous_batching() returns: transformers' manager, with another loop in its thread
support.py      what that loop can do, and why it leaves a manager to transformers
engine.py       one round of the loop, and what is done when memory is short
queues.py       where every request is: waiting, its prompt taken up, seated
request.py      one request: what it has said, and where its rows are
admission.py    who begins, with which memory
known.py        rows that requests begin with and leave behind
steps.py        what a round launches: prompts, and the next token of everybody
prompts.py      which prompts go together in one forward
sharing.py      which sequences begin in the same pages, which attention then reads once
results.py      what was said, brought to who asked
launches.py     tokens on their way from the device
program.py      all that runs on the device: steps and prompts, captured or as they are
step_graphs.py  steps for a few numbers of sequences
seats.py        the running batch in device memory: a column of numbers for each sequence
rows.py         where a sequence's keys and values lie
choice.py       from logits to the next tokens
"""
