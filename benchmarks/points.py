"""Points of a benchmark in processes of their own: one that fails, hangs or finds no memory is a row of the table."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

_STDERR_SHOWN = 3000
_LEAST_SECONDS = 10
# What ranks say when another one has gone: the reason is what that one says.
_CONSEQUENCE = re.compile(r"by peer|connection|nccl|timed out|ended with", re.IGNORECASE)


class Clock:
    """The time that all points of a run share."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, most: float) -> float:
        """How many seconds a point may take: `most`, or what is left of the run."""
        return min(most, self._end - time.monotonic())


def parser(description: str | None, models: Collection[str], *, modes: str, batch: str, layers: str) -> ArgumentParser:
    """What a benchmark of plans may be asked for, and how it asks itself for one point.

    Args:
        modes, batch, layers: what the help says of these.
    """
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--models", nargs="+", choices=models, default=list(models))
    made.add_argument("--modes", nargs="+", help=modes)
    made.add_argument("--batch", type=int, help=batch)
    made.add_argument("--layers", type=int, help=layers)
    made.add_argument("--repeats", type=int, default=10)
    made.add_argument("--timeout", type=int, default=900, help="seconds that a point may take")
    made.add_argument("--seconds", type=int, default=36_000, help="what all points may take; later ones are not run")
    made.add_argument("--codegen", choices=("inductor", "eager"), default="inductor", help="eager: to see that it runs")
    made.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    made.add_argument("--out", type=Path, help="folder of the result files")
    made.add_argument("--point", nargs=3, help=SUPPRESS)  # model, mode, file of the gradients to compare with
    made.add_argument("--result", type=Path, help=SUPPRESS)
    return made


def run_all(
    arguments: Namespace,
    point: Callable[[str, str, Path, Namespace], dict[str, Any]],
    measure: Callable[[str, Namespace, Clock], Path],
) -> None:
    """Measure all models; in a child, leave what its point found."""
    if arguments.point:
        model, mode, reference = arguments.point
        leave(arguments.result, lambda: point(model, mode, Path(reference), arguments))
    clock = Clock(arguments.seconds)
    for model in arguments.models:
        print(measure(model, arguments, clock))


def run_point(
    script: str, model: str, mode: str, reference: Path, arguments: Namespace, clock: Clock, num_ranks: int = 1
) -> dict[str, Any]:
    """A point of ``script``, which `run_all` runs, in processes of its own; what went wrong, where something did."""
    given = ["--point", model, mode, str(reference)]
    passed = ("device", "repeats", "codegen", "batch", "layers")
    given += [f"--{name}={value}" for name in passed if (value := getattr(arguments, name))]
    given += ["--quick"] if arguments.quick else []
    return run(script, given, clock.left(arguments.timeout), num_ranks)


def run(script: str, arguments: Sequence[str], seconds: float, num_ranks: int = 1) -> dict[str, Any]:
    """What rank 0 of a point found, or ``{"error": reason}``. Nothing that it started outlives it.

    A rank is the script with the arguments and ``--result FILE``, and finds torch.distributed's variables set.
    """
    if seconds < _LEAST_SECONDS:
        return {"error": "not run: the time for all points was up"}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what runs is ended first
    with tempfile.TemporaryDirectory() as folder:
        ranks = _start(script, arguments, Path(folder), num_ranks)
        try:
            in_time = _wait(ranks, seconds)
        finally:
            for rank in ranks:
                _end_group(rank)
        said = [(Path(folder) / f"stderr{rank}").read_text() for rank in range(num_ranks)]
        found = [_read(Path(folder) / f"result{rank}", ranks[rank].returncode) for rank in range(num_ranks)]
    reasons = [one["error"] for one in found if "error" in one]
    if in_time and not reasons:
        print("".join(line for line in said[0].splitlines(True) if "GiB" in line), file=sys.stderr, end="")
        return found[0]
    print(*(text[-_STDERR_SHOWN:] for text in said), sep="\n", file=sys.stderr)
    if not in_time:
        return {"error": f"not done after {seconds:.0f} s"}
    reasons.sort(key=lambda reason: bool(_CONSEQUENCE.search(reason)))
    return {"error": reasons[0][:200].replace("|", "/").replace("\n", " ")}


def leave(result: Path, point: Callable[[], dict[str, Any]]) -> None:
    """Run a point and leave what it found, or why it failed, in a file."""
    try:
        found = point()
    except BaseException as error:
        traceback.print_exc()
        no_memory = isinstance(error, torch.OutOfMemoryError) or "OutOfMemoryError" in repr(error)
        found = {"error": "out of memory" if no_memory else f"{type(error).__name__}: {error}"}
    result.write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int("error" in found))  # neither other ranks nor compile workers are waited for


def _start(script: str, arguments: Sequence[str], folder: Path, num_ranks: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "localhost"}
        with (folder / f"stderr{rank}").open("w") as errors:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, script, *arguments, "--result", str(folder / f"result{rank}")],
                    stdout=errors,
                    stderr=errors,
                    env=os.environ | environment,
                    start_new_session=True,
                )
            )
    return ranks


def _wait(ranks: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Wait for all ranks, or until one has failed; whether that was in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return True
        if any(codes):
            time.sleep(1)  # the others may be about to say why
            return True
        time.sleep(0.1)
    return False


def _read(result: Path, code: int | None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {"error": f"ended with {code}"}
    return found


def _end_group(rank: subprocess.Popen[bytes]) -> None:
    """End a rank with all that it started."""
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()
