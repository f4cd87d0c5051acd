"""`plan`: what a plan does to a model on any number of ranks: who computes what when, what moves, memory, time."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "plan"
SUMMARY = "show what a parallelization plan does to a model on any number of ranks; needs no GPU and no weights"

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    parser.add_argument("model", help="a transformers model type (llama, gpt2 …), or a folder or file with its config")
    parser.add_argument("plan", help="a name such as dp2+tp2+1f1b/8, or FILE.py:FUNCTION")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="how many ranks to plan for (default: 1)")
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="sequences in a step, of all ranks (default: 8)"
    )
    parser.add_argument("--sequence", type=int, default=512, metavar="N", help="tokens in a sequence (default: 512)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of parameters (default: bfloat16)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the config; may be repeated"
    )
    parser.add_argument(
        "--axis", action="append", default=[], metavar="NAME=SIZE", help="an axis of the mesh, for a plan from a file"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the timeline (png, svg or pdf)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the timeline for Perfetto or chrome://tracing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Explain the plan; 1 if it cannot run, 2 if something is asked for wrongly."""
    try:
        import torch
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        return _fail(2, f"`plan` needs {error.name}: pip install 'torch-vtensor[transformers]'")
    from torch._dynamo.exc import BackendCompilerFailed

    from torch_vtensor.compile.explanation import explain

    try:
        model = _make_model(arguments.model, _pairs(arguments.set), getattr(torch, arguments.dtype))
        axes = {name: int(size) for name, size in _pairs(arguments.axis).items()}
    except (OSError, ValueError, TypeError) as error:
        return _fail(2, str(error))
    tokens = torch.zeros(arguments.batch, arguments.sequence, dtype=torch.long, device="meta")
    start = time.perf_counter()
    try:
        explained = explain(
            lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss,
            tokens,
            plan=arguments.plan,
            mesh=axes or arguments.ranks,
        )
    except BackendCompilerFailed as error:
        return _fail(1, str(error.inner_exception))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return _fail(1, str(error))
    print(explained)
    print(f"planned and checked in {time.perf_counter() - start:.1f} s")
    if arguments.picture:
        explained.draw(arguments.picture, f"{arguments.plan} on {arguments.ranks} ranks")
        print(f"picture: {arguments.picture}")
    if arguments.trace:
        explained.write_trace(arguments.trace)
        print(f"trace: {arguments.trace}")
    return 0


def _make_model(name: str, changes: dict[str, Any], dtype: Any) -> Any:
    """A language model of a configuration, an encoder-decoder's too, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if Path(name).exists():
        config = AutoConfig.from_pretrained(name, **changes)
    else:
        config = AutoConfig.for_model(name, **changes)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config).to(dtype)


def _pairs(given: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` with values as JSON where they are any, text otherwise."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"got {text!r} where KEY=VALUE is wanted, as in num_hidden_layers=4")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _fail(status: int, message: str) -> int:
    print(f"torch-vtensor plan: {message}", file=sys.stderr)
    return status
