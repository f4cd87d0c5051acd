"""Continuous batching: transformers' generate_batch() and serve, over sequences at addresses of their own.

manager.py    what init_continuous_batching() returns: transformers' manager, with another loop in its thread
support.py    what that loop can do, and why it leaves a manager to transformers
engine.py     one round of the loop: take in, begin, take up prompts, decode, deliver
request.py    one request: what it has said, and where its rows are
known.py      rows that requests begin with and leave behind
launches.py   tokens on their way from the device
rows.py       where a sequence's keys and values lie
seats.py      the running batch in device memory: a column of numbers for each sequence
choice.py     from logits to the next tokens
program.py    the steps for a few batch sizes, as captured graphs or as they are
"""
