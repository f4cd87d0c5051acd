"""`limit`: give a running process another budget."""

import argparse
import sys

from torch_vtensor.settings import format_bytes, parse_bytes, status_folder
from torch_vtensor.status import ask_for_budget

NAME = "limit"
SUMMARY = "change how much memory a running process may hold through torch_vtensor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `limit`."""
    parser.add_argument("pid", type=int, help="the process, as `top` lists it")
    parser.add_argument("bytes", help='the budget, such as 8GiB, or "none"')
    parser.add_argument("--device", help="only on this device, such as cuda:0 (default: on all that it uses)")


def run(arguments: argparse.Namespace) -> int:
    """Ask the process for it; 1 if there is no such process or device."""
    try:
        budget_bytes = None if arguments.bytes.lower() == "none" else parse_bytes(arguments.bytes)
        devices = ask_for_budget(status_folder(), arguments.pid, budget_bytes, arguments.device)
    except (PermissionError, ProcessLookupError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    limit = "no limit" if budget_bytes is None else f"a budget of {format_bytes(budget_bytes)}"
    print(
        f"process {arguments.pid} was given {limit} on {', '.join(devices)}, and gives back what it keeps idle beyond"
    )
    return 0
