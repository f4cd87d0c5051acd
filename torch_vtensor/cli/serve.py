"""`serve`: transformers' server, an OpenAI-compatible one, with continuous batching over memory that grows in place."""

import argparse
import sys

from torch_vtensor.settings import parse_bytes

NAME = "serve"
SUMMARY = "start `transformers serve` with continuous batching over memory that grows in place"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.add_argument("--graphs", action="store_true", help="compile and capture the steps: enable(compile=True)")
    parser.add_argument("--prefixes", action="store_true", help="reuse prefixes: enable(prefix_cache=True)")
    parser.add_argument("--budget", type=_budget, metavar="SIZE", help="most memory for caches, such as 8GiB")
    parser.add_argument("model", help="the model to load and serve: a name or a folder")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="what `transformers serve` takes besides: --port 8000"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is interrupted; then print what was done."""
    missing = _why_not()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 1
    import torch_vtensor
    from torch_vtensor.generation.enable import stop_batching
    from torch_vtensor.generation.serving._transformers_compat import run_server

    torch_vtensor.enable(compile=arguments.graphs, prefix_cache=arguments.prefixes, budget_bytes=arguments.budget)
    try:
        run_server([arguments.model, "--continuous-batching", *arguments.options])
    finally:
        stop_batching()
        print(torch_vtensor.stats())
    return 0


def _why_not() -> str | None:
    """What is missing for a server, or None."""
    try:
        from torch_vtensor.generation.serving._transformers_compat import why_no_server
    except ImportError as error:
        return f"{error}. Install what a server needs: pip install 'torch-vtensor[serving]'"
    return why_no_server()


def _budget(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
