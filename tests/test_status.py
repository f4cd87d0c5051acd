"""What processes show each other, and budgets that change from outside, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from torch_vtensor.cli import main
from torch_vtensor.settings import status_folder
from torch_vtensor.status import Figures, StatusFile, ask_for_budget, processes

FIGURES = Figures(1000, 700, 100, 30, 50, -1)

# A process that does what it is told, a line at a time, and answers each with a line.
WORKER = """
import sys, torch
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import OutOfPagesError

vtensor = VTensor((65536,), capacity=1000, dtype=torch.uint8)
scheduler = default_scheduler(torch.device("cpu"))
print("ready", flush=True)
for line in sys.stdin:
    try:
        exec(line)
    except OutOfPagesError:
        print("out of pages", flush=True)
    else:
        print("done", flush=True)
"""
GROW = "vtensor.append(torch.ones({}, 65536, dtype=torch.uint8))"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return status_folder()


class Worker:
    """A process with a VTensor of rows of 64 KiB."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()


@contextmanager
def worker(**environ: str) -> Iterator[Worker]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | environ,
    )  # fmt: skip
    with process:
        yield Worker(process)
        process.kill()


def top(capsys: pytest.CaptureFixture[str]) -> dict[int, dict[str, Any]]:
    capsys.readouterr()
    assert main(["top", "--json"]) == 0
    return {it["pid"]: it for it in json.loads(capsys.readouterr().out)}


def test_processes_are_listed_limited_and_forgotten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with worker() as one, worker() as other:
        assert one.do(GROW.format(100)) == other.do(GROW.format(10)) == "done"
        found = top(capsys)
        assert found.keys() == {one.pid, other.pid}
        assert found[one.pid]["device"] == "cpu"
        assert found[one.pid]["committed_bytes"] >= 100 * 65536 > found[other.pid]["committed_bytes"] >= 10 * 65536
        assert found[one.pid]["reserved_bytes"] >= 1000 * 65536
        assert found[one.pid]["budget_bytes"] is None
        assert other.do("fork = vtensor.fork()") == other.do("vtensor.offload()") == "done"
        assert other.do("fork.offload()") == "done"
        shown = top(capsys)[other.pid]
        assert (shown["offloaded_bytes"] >= 10 * 65536, shown["shared_bytes"] >= 10 * 65536) == (True, True)

        # What is idle goes at the next growth, what is in use stays, and more is refused.
        assert (
            one.do("vtensor.close()")
            == one.do("vtensor = VTensor((65536,), capacity=1000, dtype=torch.uint8)")
            == "done"
        )
        assert one.do(GROW.format(5)) == "done"
        assert main(["limit", str(one.pid), "1MiB"]) == 0
        assert "a budget of 1 MiB on cpu" in capsys.readouterr().out
        assert top(capsys)[one.pid]["budget_bytes"] is None
        assert one.do(GROW.format(3)) == "done"
        shown = top(capsys)[one.pid]
        assert (shown["budget_bytes"], shown["committed_bytes"] <= 2**20) == (2**20, True)
        assert one.do(GROW.format(30)) == "out of pages"
        assert main(["limit", str(one.pid), "none", "--device", "cpu"]) == 0
        assert one.do(GROW.format(30)) == "done"
        assert top(capsys)[one.pid]["budget_bytes"] is None

        one.process.send_signal(signal.SIGKILL)
        one.process.wait()
        assert top(capsys).keys() == {other.pid}
        assert sorted(path.name for path in folder.iterdir()) == [str(other.pid)]
        assert main(["limit", str(one.pid), "1MiB"]) == 1
        assert "`python -m torch_vtensor top`" in capsys.readouterr().err
        other.process.stdin.close()
        other.process.wait()
        assert list(folder.iterdir()) == []


def test_a_process_may_stay_unseen_and_a_forked_one_shows_its_own(
    folder: Path, run_python: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with worker(TORCH_VTENSOR_STATUS="0") as unseen:
        assert unseen.do(GROW.format(3)) == "done"
        assert top(capsys) == {}
    code = """
import os, torch
torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
from torch_vtensor import VTensor
from torch_vtensor.settings import status_folder
from torch_vtensor.status import processes

vtensor = VTensor((65536,), capacity=10, dtype=torch.uint8)
vtensor.append(torch.ones(5, 65536, dtype=torch.uint8))
before = processes(status_folder())
child = os.fork()
if child == 0:
    assert processes(status_folder()) == before
    own = VTensor((65536,), capacity=10, dtype=torch.uint8)
    own.append(torch.ones(1, 65536, dtype=torch.uint8))
    found = {it.pid: it.figures.committed_bytes for it in processes(status_folder())}
    assert found.keys() == {os.getpid(), os.getppid()} and found[os.getpid()] < found[os.getppid()], found
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert [it.pid for it in processes(status_folder())] == [os.getpid()]
"""
    run_python(code)
    assert list(folder.iterdir()) == []


def test_figures_are_read_as_written(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "status")
    record = file.record("cuda:0")
    assert processes(tmp_path / "status") == []  # nothing was said yet
    for i in range(10):
        record.publish(FIGURES._replace(committed_bytes=i))
        (found,) = processes(tmp_path / "status")
        assert (found.pid, found.device, found.figures.committed_bytes) == (os.getpid(), "cuda:0", i)
    assert file.record("cuda:0") is record
    del file, record
    assert processes(tmp_path / "missing") == []


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_a_folder_that_others_can_reach_is_left_alone(kind: str, tmp_path: Path) -> None:
    private, folder = tmp_path / "private", tmp_path / "status"
    private.mkdir(mode=0o700)
    (private / "1").write_bytes(b"")  # looks like what a killed process left
    if kind == "link":
        folder.symlink_to(private)
    elif kind == "file":
        folder.write_bytes(b"")
    else:
        private.chmod(0o755)
        folder = private
    for use in (lambda: processes(folder), lambda: ask_for_budget(folder, os.getpid(), 4096)):
        with pytest.raises(PermissionError, match="not a folder of this user's alone"):
            use()
    with pytest.raises(OSError, match=r"of this user's alone|exists"):
        StatusFile(folder)
    assert (private / "1").exists()


def test_wishes_are_heard_once(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    first, second = file.record("cuda:0"), file.record("cuda:1")
    for record in (first, second):
        record.publish(FIGURES)
    assert first.asked_budget() is None
    assert ask_for_budget(tmp_path, os.getpid(), 4096, "cuda:1") == ["cuda:1"]
    assert (first.asked_budget(), second.asked_budget(), second.asked_budget()) == (None, (4096,), None)
    assert ask_for_budget(tmp_path, os.getpid(), None) == ["cuda:0", "cuda:1"]
    assert (first.asked_budget(), second.asked_budget()) == ((None,), (None,))
    with pytest.raises(ValueError, match="'cpu'; it uses cuda:0, cuda:1"):
        ask_for_budget(tmp_path, os.getpid(), 4096, "cpu")
    with pytest.raises(ValueError, match="at least one byte"):
        ask_for_budget(tmp_path, os.getpid(), 0)


def test_a_number_that_another_process_has_now_is_stale(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    file.record("cpu").publish(FIGURES)
    content = bytearray(file.path.read_bytes())
    content[16] ^= 1  # when the process started
    (tmp_path / "1").write_bytes(content)
    (tmp_path / "2").write_bytes(b"")
    (tmp_path / "99999999.new").write_bytes(b"")  # killed before it was finished
    assert [it.pid for it in processes(tmp_path)] == [os.getpid()]
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_the_table_says_who_and_how_much(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = StatusFile(folder)
    file.record("cuda:0").publish(Figures(2**30, 3 * 2**20, 0, 0, 2**19, -1))
    assert main(["top"]) == 0
    (header, line) = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["pid", "device"]
    assert line.split()[:8] == [str(os.getpid()), "cuda:0", "1,024.0", "3.0", "0.0", "0.0", "0.5", "none"]
