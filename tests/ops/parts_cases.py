"""Cases of prefill_attention whose blocks of rows are cut into parts, each with the multiprocessors to fill."""

from __future__ import annotations

import torch
from attention_cases import AttentionCase
from cached_cases import PROMPTS

STEP = 32
"""Tokens a step in float32; a part is of two or more."""
SMALL = {"dims": (16, 16), "heads": 1, "group": 2, "num_rows": 4}

CASES = [
    *((AttentionCase(lengths=(4 * 2 * STEP + more,), **SMALL), 4) for more in (-1, 0, 1)),
    *((AttentionCase(lengths=(length,), **SMALL), 16) for length in (1, 4, 2 * STEP, 2 * STEP + 1, 3 * STEP + 1)),
    (AttentionCase(lengths=(0, 700, 0, 31), room=70, **SMALL), 20),
    (AttentionCase(lengths=(900, 40, 40, 40, 500), counts_dtype=torch.int32, **SMALL), 11),
    (AttentionCase(lengths=(400, 410), dims=(24, 32), heads=1, num_rows=12, window=150, first=(0, 300)), 17),
    (AttentionCase(lengths=(300,), dims=(16, 16), heads=1, num_rows=24, window=3, has_sinks=True), 12),
    (AttentionCase(lengths=(300, 200, 9), heads=1, group=2, num_rows=17, num_new=(1, 17, 0), softcap=5.0, room=3), 13),
    (AttentionCase(lengths=(300, 30), heads=1, group=1, num_rows=33, dims=(16, 16), causal=False, first=(0, 7)), 9),
    (AttentionCase(lengths=(30, 300), heads=1, group=1, num_rows=70, dims=(16, 16), has_sinks=True), 8),
    (AttentionCase(lengths=(700, 0), dtype=torch.float16, group=4, num_rows=2, layout="interleaved"), 10),
    (AttentionCase(lengths=(400,), dtype=torch.float16, dims=(32, 32), num_rows=22, heads=1, layout="token_major"), 4),
]
CACHED = [(PROMPTS[3], 8)]
"""With the rows' tokens to be written first, as ``CachedCall`` has them."""
LONG = [
    AttentionCase(lengths=(4096 + 128,), heads=8, group=4, num_rows=128),
    AttentionCase(lengths=(4096 + 16,), heads=8, group=4, num_rows=16, layout="interleaved", room=100),
    AttentionCase(lengths=(3000 + 129,), heads=8, group=4, num_rows=192, num_new=(129,), first=(60,), room=70),
    AttentionCase(lengths=(9000, 17, 800, 3000), heads=2, group=4, num_rows=8, num_new=(8, 8, 5, 0)),
    AttentionCase(lengths=(5000, 5100), heads=2, group=8, num_rows=33, window=1500, has_sinks=True, softcap=30.0),
    AttentionCase(lengths=(2000, 300), heads=2, group=3, num_rows=70, causal=False, layout="token_major"),
    AttentionCase(lengths=(700,), heads=2, group=4, num_rows=700),
]
"""For a GPU, in 16 bits and head dims 64 and 128."""
