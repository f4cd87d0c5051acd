"""`info`: what this machine offers, what will be used on each device, and what to install for more."""

import argparse
import dataclasses
import json
import logging
from collections.abc import Mapping

from torch_vtensor.cli.machine import Device, Machine, inspect_machine
from torch_vtensor.settings import GIB, Settings, format_bytes, load_settings

NAME = "info"
SUMMARY = "show devices, drivers and versions, and what will be used on each device and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `info`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    machine = inspect_machine(load_settings())
    print(json.dumps(dataclasses.asdict(machine), indent=2) if arguments.json else _describe(machine))
    return 0


def _describe(machine: Machine) -> str:
    sections = [["versions", *_columns(machine.versions | {"native library": machine.library})]]
    sections += [_describe_device(device) for device in machine.devices]
    if machine.missing:
        sections.append(["missing", *(f"  {text}" for text in machine.missing)])
    sections.append(["settings", *_columns(_describe_settings(machine.settings))])
    return "\n\n".join("\n".join(lines) for lines in sections)


def _describe_device(device: Device) -> list[str]:
    used = device.driver or "nothing of torch_vtensor"
    if device.page_sizes:
        used += f" with pages of {', '.join(map(format_bytes, device.page_sizes))}"
    return [
        f"{device.device}  {device.name}, {device.memory_bytes / GIB:.1f} GiB",
        *_columns(
            {
                "virtual memory": "supported" if device.virtual_memory else "not supported",
                "will be used": used,
                "because": device.reason,
            }
        ),
    ]


def _describe_settings(settings: Settings) -> dict[str, str | None]:
    return {
        "enable on import": "yes" if settings.enable else "no",
        "budget": "what the device has" if settings.budget_bytes is None else format_bytes(settings.budget_bytes),
        "host page": format_bytes(settings.page_bytes),
        "offload": "what there is" if settings.offload_bytes is None else format_bytes(settings.offload_bytes),
        "offload folder": settings.offload_folder,
        "unwanted memory": "kept" if settings.idle_seconds is None else f"kept {settings.idle_seconds:g} s",
        "shown in `top`": "yes" if settings.status else "no",
        "NVTX ranges": "yes" if settings.nvtx else "no",
        "log level": logging.getLevelName(settings.log_level),
    }


def _columns(rows: Mapping[str, str | None]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {value or 'none'}" for name, value in rows.items()]
