"""`top`: what each process of this user holds on each device."""

import argparse
import json
import sys
import time

from torch_vtensor.settings import MIB, status_folder
from torch_vtensor.status import DeviceStatus, processes

NAME = "top"
SUMMARY = "show what every process of this user holds of each device through torch_vtensor"

_COLUMNS = ("reserved", "committed", "pooled", "torch", "shared", "offloaded", "budget")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `top`."""
    parser.add_argument("--json", action="store_true", help="print one JSON list, sizes in bytes")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="go on, and print again every so many seconds")


def run(arguments: argparse.Namespace) -> int:
    """Print the table once, or until interrupted."""
    while True:
        try:
            found = processes(status_folder())
        except PermissionError as error:
            print(error, file=sys.stderr)
            return 1
        print(json.dumps([_as_json(it) for it in found], indent=2) if arguments.json else _as_table(found), flush=True)
        if arguments.every is None:
            return 0
        try:
            time.sleep(arguments.every)
        except KeyboardInterrupt:
            return 0


def _as_json(status: DeviceStatus) -> dict[str, object]:
    figures = status.figures._asdict()
    budget_bytes = figures.pop("budget_bytes")
    return {
        "pid": status.pid,
        "command": status.command,
        "device": status.device,
        **figures,
        "budget_bytes": None if budget_bytes < 0 else budget_bytes,
    }


def _as_table(found: list[DeviceStatus]) -> str:
    lines = [f"{'pid':>8}  {'device':<8}" + "".join(f"{name:>12}" for name in _COLUMNS) + "  command  (MiB)"]
    for it in found:
        cells = [getattr(it.figures, f"{name}_bytes") for name in _COLUMNS]
        sizes = "".join(f"{'none' if size < 0 else format(size / MIB, ',.1f'):>12}" for size in cells)
        lines.append(f"{it.pid:>8}  {it.device:<8}{sizes}  {it.command[:60]}")
    return "\n".join(lines)
