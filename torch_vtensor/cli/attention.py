"""`attention`: which implementation the attention operators take here, and the measured figures behind it."""

import argparse

NAME = "attention"
SUMMARY = "show which implementation the attention operators take on this machine, and how fast each was measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `attention`."""
    parser.add_argument("--device", help="the device to tell for (default: the first GPU, or else the CPU)")


def run(arguments: argparse.Namespace) -> int:
    """Print one line for each kind of call: the figures, and who is chosen."""
    import torch

    from torch_vtensor.ops.attention_choice import MEASURED, NAMES, Case, choose

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = [name for name in NAMES if any(name in regime.ratios for regime in MEASURED)]
    width = max(len(regime.name) for regime in MEASURED)
    print("Time on the device over that of the fastest of torch's and ours, and who is chosen")
    print(f"on {device} (8 sequences of Llama-3-8B, bfloat16), by where the lengths are known:\n")
    print(f"{'':{width}}  " + "".join(f"{name:>8}" for name in names) + "   host      device")
    for regime in MEASURED:
        rows, tokens = regime.example
        op = "decode" if rows == 1 else "prefill"
        case = Case(op, device, torch.bfloat16, 128, 128, 8, 32, 8, rows, tokens, True, False, ())
        figures = [f"{regime.ratios[name]:.2f}" if name in regime.ratios else "–" for name in names]
        chosen = choose(case), choose(case._replace(has_counts=True))
        columns = "".join(f"{figure:>8}" for figure in figures)
        print(f"{regime.name:{width}}  {columns}   {chosen[0]:<8}  {chosen[1]}")
    return 0
