"""The command line, on this machine and on pretended ones."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import torch_vtensor
from torch_vtensor.cli import COMMANDS, machine, main, plan
from torch_vtensor.errors import DriverError
from torch_vtensor.ops.attention_choice import MEASURED
from torch_vtensor.settings import _READERS as VARIABLES
from torch_vtensor.settings import GIB, MIB


def read_info(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_module_runs_as_a_program(run_python: Callable[..., str]) -> None:
    assert "usage: python -m torch_vtensor " in run_python("-m", "torch_vtensor", "--help")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"torch_vtensor {torch_vtensor.__version__}"


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command.NAME in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_every_command_and_argument_has_help(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command.NAME, "--help"])
    assert caught.value.code == 0
    assert command.SUMMARY in " ".join(capsys.readouterr().out.split())
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inform"])
    assert caught.value.code == 2
    assert "inform" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "-m", "torch_vtensor", "info"], [str(Path(sys.executable).with_name("torch-vtensor")), "info"]],
    ids=["module", "script"],
)
def test_an_unreadable_setting_ends_every_command_with_one_line(command: list[str], tmp_path: Path) -> None:
    environ = os.environ | {"TORCH_VTENSOR_LOG": "loud"}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert line.startswith("TORCH_VTENSOR_LOG=loud: ")
    assert "the levels are DEBUG, INFO" in line
    assert (done.returncode, done.stdout) == (2, "")


def test_an_unreadable_setting_is_an_error_for_programs(run_python: Callable[..., str]) -> None:
    printed = run_python(
        "try:\n    import torch_vtensor\nexcept ValueError as error:\n    print(error)",
        environ={"TORCH_VTENSOR_PAGE_BYTES": "64KB"},
    )
    assert printed.startswith("TORCH_VTENSOR_PAGE_BYTES=64KB: '64KB' is not a size")


def test_info_shows_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def settings_shown() -> set[str]:
        assert main(["info"]) == 0
        _, _, shown = capsys.readouterr().out.partition("\nsettings\n")
        return set(shown.splitlines())

    before = settings_shown()
    others = {"STATUS": "0", "NVTX": "1", "BUDGET_BYTES": "8GiB", "OFFLOAD_BYTES": "9GiB", "OFFLOAD_FOLDER": "/tmp",
              "IDLE_SECONDS": "7", "PAGE_BYTES": "128KiB", "LOG": "error"}  # fmt: skip
    assert others.keys() | {"ENABLE"} == VARIABLES.keys()
    for name, value in others.items():
        with monkeypatch.context() as changed:
            changed.setenv(f"TORCH_VTENSOR_{name}", value)
            assert len(settings_shown() - before) == 1, name


def test_info_on_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_VTENSOR_PAGE_BYTES", "1MiB")
    report = read_info(capsys)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["torch_vtensor"] == torch_vtensor.__version__
    cpu = report["devices"][0]
    assert (cpu["device"], cpu["driver"], cpu["page_sizes"][0]) == ("cpu", "HostDriver", MIB)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "HostDriver with pages of 1 MiB" in printed


@pytest.mark.gpu
def test_info_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = read_info(capsys)["devices"][1]
    assert (gpu["device"], gpu["driver"]) == ("cuda:0", "CudaDriver")
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert gpu["memory_bytes"] == torch.cuda.get_device_properties(0).total_memory
    assert gpu["page_sizes"]
    assert all(page_bytes % (2 * MIB) == 0 for page_bytes in gpu["page_sizes"])


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, driver: object, **others: object) -> None:
    bindings = SimpleNamespace(driver=driver, **others)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=bindings))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)


def pretend_driver(virtual_memory: int) -> SimpleNamespace:
    """One device of a pretended driver, whose calls answer as cuda.bindings' do."""
    answers = {
        "cuInit": (),
        "cuDriverGetVersion": (13000,),
        "cuDeviceGetCount": (1,),
        "cuDeviceGet": (0,),
        "cuDeviceGetAttribute": (virtual_memory,),
        "cuDeviceGetName": (b"Pretended GPU\0\0\0",),
        "cuDeviceTotalMem": (80 * GIB,),
    }
    calls = {name: lambda *_, answer=answer: (Result.CUDA_SUCCESS, *answer) for name, answer in answers.items()}
    return SimpleNamespace(
        CUdevice_attribute=SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=102),
        **calls,
    )


def test_info_without_bindings_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    report = read_info(capsys)
    assert [device["device"] for device in report["devices"]] == ["cpu"]
    assert any("pip install 'torch-vtensor[cuda]'" in text for text in report["missing"])


def test_info_names_the_driver_call_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cuInit(flags: int) -> tuple[Result]:
        return (Result.CUDA_ERROR_NO_DEVICE,)

    pretend_cuda(monkeypatch, SimpleNamespace(cuInit=cuInit))
    (text,) = (text for text in read_info(capsys)["missing"] if text.startswith("CUDA"))
    assert "cuInit answered CUDA_ERROR_NO_DEVICE" in text


@pytest.mark.parametrize(
    ("virtual_memory", "torch_cuda", "num_seen", "refusal", "reason"),
    [
        (1, "13.0", 1, None, "torch sees it"),
        (1, None, 0, None, "install a CUDA build of torch"),
        (1, "13.0", 0, None, "sees 0 CUDA devices"),
        (1, "13.0", 1, "CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_SUPPORTED"),
        (0, "13.0", 1, None, "no virtual memory management"),
    ],
)
def test_info_says_what_is_used_on_a_gpu_and_why(
    virtual_memory: int,
    torch_cuda: str | None,
    num_seen: int,
    refusal: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def open_driver(ordinal: int) -> SimpleNamespace:
        if refusal:
            raise DriverError("cuMemGetAllocationGranularity", refusal, torch.device("cuda", ordinal), 0)
        return SimpleNamespace(page_sizes=(2 * MIB, 32 * MIB))

    pretend_cuda(monkeypatch, pretend_driver(virtual_memory))
    monkeypatch.setattr(machine, "CudaDriver", open_driver)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_seen)
    used = reason == "torch sees it"
    report = read_info(capsys)
    gpu = report["devices"][1]
    assert (gpu["device"], gpu["name"], gpu["memory_bytes"]) == ("cuda:0", "Pretended GPU", 80 * GIB)
    assert gpu["driver"] == ("CudaDriver" if used else None)
    assert gpu["page_sizes"] == ([2 * MIB, 32 * MIB] if used else [])
    assert reason in gpu["reason"]
    assert report["versions"]["CUDA driver"] == "13.0"
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert reason in printed
    assert ("CudaDriver with pages of 2 MiB, 32 MiB" if used else "nothing of torch_vtensor") in printed


def test_info_says_what_nvrtc_is_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_cuda(monkeypatch, pretend_driver(1), nvrtc=SimpleNamespace(nvrtcVersion=lambda: (0, 13, 2)))
    report = read_info(capsys)
    assert report["versions"]["NVRTC"] == "13.2"
    assert not any("NVRTC" in text for text in report["missing"])

    def not_found() -> tuple[int, int, int]:
        raise RuntimeError("no libnvrtc.so.13 in /lib, /usr/lib")

    pretend_cuda(monkeypatch, pretend_driver(1), nvrtc=SimpleNamespace(nvrtcVersion=not_found))
    report = read_info(capsys)
    assert report["versions"]["NVRTC"] is None
    (text,) = (text for text in report["missing"] if "NVRTC" in text)
    assert text.startswith("NVRTC (no libnvrtc.so.13 in /lib): without it torch copies new keys and values")


def test_plan_shows_a_plan_for_many_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    config = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    changes = [word for name, value in config.items() for word in ("--set", f"{name}={value}")]
    trace = tmp_path / "step.json"
    asked = ["plan", "llama", "tp2+1f1b/2", "--ranks", "4", "--batch", "4", "--sequence", "16", "--trace", str(trace)]
    assert main([*asked, *changes]) == 0
    printed = capsys.readouterr().out
    assert "Plan for a Mesh pp 2 × tp 2, 4 ranks, 2 microbatches" in printed
    assert "rank 0-1 | " in printed
    assert json.loads(trace.read_text())


def test_plan_makes_encoder_decoders_too() -> None:
    pytest.importorskip("transformers")
    model = plan._make_model("t5", {"num_layers": 1, "d_model": 8, "d_ff": 8, "vocab_size": 16}, torch.bfloat16)
    assert (type(model).__name__, model.device.type) == ("T5ForConditionalGeneration", "meta")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["llama", "dp3", "--ranks", "2"], 1, "the plan 'dp3' is for dp 3, and the world has 2 ranks"),
        (["no_such_model", "dp"], 2, "no_such_model"),
        (["llama", "dp", "--set", "num_hidden_layers"], 2, "KEY=VALUE is wanted"),
    ],
)
def test_plan_says_what_is_wrong(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    small = ["--set", "num_hidden_layers=1", "--set", "hidden_size=32", "--set", "intermediate_size=32"]
    assert main(["plan", *arguments, *small, "--sequence", "8"]) == status
    assert message in capsys.readouterr().err


def test_attention_says_who_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("cpu       cpu") for line in lines) == len(MEASURED)
    assert any(line.startswith("decode below 0.5 GB") and "1.00" in line for line in lines)
