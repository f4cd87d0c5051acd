"""Tasks of train.py on GPUs that talk by NCCL: ``torchrun --nproc-per-node 2 train_on_gpus.py plan@model@codegen …``.

A task that fails is reported, and the next one done. Every rank writes what it did to ``rank<number>.txt`` in the
current folder.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.train import run_tasks
from forked_ranks import WAIT

if __name__ == "__main__":
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", timeout=WAIT)
    failed = []
    with Path(f"rank{rank}.txt").open("w") as log, contextlib.redirect_stdout(log):
        for task in sys.argv[1:]:
            try:
                run_tasks([task], f"cuda:{rank}")
            except Exception:
                traceback.print_exc()
                failed.append(task)
    dist.destroy_process_group()
    sys.exit(f"failed: {failed}" if failed else 0)
