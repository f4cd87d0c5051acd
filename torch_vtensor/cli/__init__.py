"""The command line. A command is a light module of this folder, named in COMMANDS; `run` does the heavy imports."""

import argparse
from collections.abc import Callable, Sequence
from typing import Protocol

from torch_vtensor import __version__
from torch_vtensor.cli import attention, demo, info, limit, plan, serve, top


class Command(Protocol):
    """What a module of this folder provides."""

    NAME: str
    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments to its parser."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and return the exit status."""


COMMANDS: tuple[Command, ...] = (info, demo, plan, attention, serve, top, limit)


def main(argv: Sequence[str] | None = None, program: str = "torch-vtensor") -> int:
    """Run one command and return the exit status: 0 done, 1 the command found a problem, 2 it was called wrongly."""
    parser = argparse.ArgumentParser(
        prog=program, description="Growable KV memory for HuggingFace generate(), and compiled parallel training."
    )
    parser.add_argument("--version", action="version", version=f"torch_vtensor {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help()
        return 0
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)
