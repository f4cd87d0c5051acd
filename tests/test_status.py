"""What processes show each other, and budgets that change from outside, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worker_processes import GROW, eventually, worker

from torch_vtensor.allocator.ledger import Ledger
from torch_vtensor.allocator.watcher import Watcher
from torch_vtensor.cli import main
from torch_vtensor.settings import status_folder
from torch_vtensor.status import Figures, StatusFile, ask_for_budget, ask_to_trim, processes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return status_folder()


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

        # What is idle goes by itself, what is in use stays, and more is refused.
        assert (
            one.do("vtensor.close()")
            == one.do("vtensor = VTensor((65536,), capacity=1000, dtype=torch.uint8)")
            == "done"
        )
        assert one.do(GROW.format(5)) == "done"
        assert top(capsys)[one.pid]["committed_bytes"] > 2**20
        assert main(["limit", str(one.pid), "1MiB"]) == 0
        assert "a budget of 1 MiB on cpu" in capsys.readouterr().out
        assert eventually(lambda: top(capsys)[one.pid]["committed_bytes"] <= 2**20)
        assert top(capsys)[one.pid]["budget_bytes"] == 2**20
        assert one.do(GROW.format(3)) == "done"
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


def shown_in(file: StatusFile, device: str = "cpu", num_pages: int = 1) -> Ledger:
    """A ledger that has charged so many pages of 4096 bytes, and shows it as the figures of a device."""
    ledger = Ledger()
    ledger.show(file.record(device).figures_address)
    for _ in range(num_pages):
        ledger.take(4096)
    return ledger


def test_figures_are_read_as_written(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "status")
    record = file.record("cuda:0")
    ledger = Ledger()
    ledger.show(record.figures_address)
    for i in range(10):
        ledger.take(4096)
        ledger.note(100 * i, 10 * i, i)
        (found,) = processes(tmp_path / "status")
        figures = Figures((i + 1) * 4096, 0, 0, -1, 100 * i, 10 * i, i)
        assert (found.pid, found.device, found.figures) == (os.getpid(), "cuda:0", figures)
    ledger.budget_bytes = 2**30
    ledger.put(7, 4096)
    assert processes(tmp_path / "status")[0].figures[:4] == (10 * 4096, 4096, 0, 2**30)
    ledger.show(None)
    ledger.uncharge(4096)
    assert processes(tmp_path / "status")[0].figures[0] == 10 * 4096
    assert file.record("cuda:0") is record
    del file, record
    assert processes(tmp_path / "missing") == []


def test_figures_are_never_read_half_written(folder: Path) -> None:
    """A process that changes them without a pause: what is read always belongs together."""
    code = """
import sys
from torch_vtensor.allocator.ledger import Ledger
from torch_vtensor.allocator.watcher import Watcher
from torch_vtensor.settings import status_folder
from torch_vtensor.status import StatusFile

file, ledger = StatusFile(status_folder()), Ledger()
ledger.show(file.record("cpu").figures_address)
ledger.take(4096)
ledger.note(0, 0, 0)
print("ready", flush=True)
number = 0
while True:
    number += 1
    ledger.note(number, -number, number)
    if number % 2:
        ledger.put(number, 4096)
    else:
        ledger.take(4096)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == "ready"
        seen = set()
        for _ in range(3000):
            ((_, _, _, figures),) = processes(folder)
            assert (figures.shared_bytes, figures.offloaded_bytes) == (-figures.reserved_bytes, figures.reserved_bytes)
            assert (figures.committed_bytes, figures.pooled_bytes in (0, 4096)) == (4096, True)
            seen.add(figures)
        assert len(seen) > 100, "nothing changed meanwhile"
        writer.kill()
    assert processes(folder) == []


def test_a_process_killed_while_it_wrote_is_read_all_the_same(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    ledger = shown_in(file)
    content = bytearray(file.path.read_bytes())
    at = content.index((4096).to_bytes(8, sys.byteorder)) - 8
    with file.path.open("r+b") as changed:
        changed.seek(at)
        changed.write(bytes([content[at] | 1]))
    assert [it.figures.committed_bytes for it in processes(tmp_path)] == [4096]
    assert ledger.committed_bytes == 4096


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
    ledger = shown_in(file)
    content = bytearray(file.path.read_bytes())
    content[16] ^= 1  # when the process started
    (tmp_path / "1").write_bytes(content)
    (tmp_path / "2").write_bytes(b"")
    (tmp_path / "99999999.new").write_bytes(b"")  # killed before it was finished
    assert [it.pid for it in processes(tmp_path)] == [os.getpid()]
    assert ledger.committed_bytes == 4096
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_the_table_says_who_and_how_much(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = StatusFile(folder)
    ledger = shown_in(file, "cuda:0", 768)
    ledger.note(2**30, 0, 2**19)
    assert main(["top"]) == 0
    (header, line) = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["pid", "device"]
    assert line.split()[:9] == [str(os.getpid()), "cuda:0", "1,024.0", "3.0", "0.0", "0.0", "0.0", "0.5", "none"]


def test_idle_memory_is_asked_of_others_on_the_same_device(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    record = file.record("cuda:0", "GPU-1")
    ledger = shown_in(file, "cuda:0")
    assert record.asked_trim() == 0
    assert ask_to_trim(tmp_path, "GPU-1", 100) == []  # not of itself
    other = tmp_path / "1"
    content = file.path.read_bytes()
    parent = content.replace(os.getpid().to_bytes(8, sys.byteorder), os.getppid().to_bytes(8, sys.byteorder), 1)
    started = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    other.write_bytes(parent[:16] + started.to_bytes(8, sys.byteorder) + parent[24:])
    assert ask_to_trim(tmp_path, "GPU-2", 100) == []
    (request,) = ask_to_trim(tmp_path, "GPU-1", 100)
    assert not request.is_answered()
    (again,) = ask_to_trim(tmp_path, "GPU-1", 300)
    assert (again.path, again.number) == (other, request.number + 1)
    other.unlink()
    assert request.is_answered()
    assert ledger.committed_bytes == 4096


def test_a_watcher_sleeps_until_somebody_writes_and_ends(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    record, heard = file.record("cpu"), threading.Semaphore(0)
    watcher = Watcher(file.path, heard.release)
    assert heard.acquire(timeout=30)  # for what was asked before it listened
    ledger = shown_in(file)
    assert not heard.acquire(timeout=0.2), "the process woke itself"
    for number in range(3):
        ask_for_budget(tmp_path, os.getpid(), 4096 + number)
        assert heard.acquire(timeout=30)
        while heard.acquire(timeout=0.05):  # a wish is two writes
            pass
        assert record.asked_budget() == (4096 + number,)
    assert watcher._thread in threading.enumerate()
    watcher.stop()
    watcher.stop()
    assert watcher._thread not in threading.enumerate()
    assert ledger.committed_bytes == 4096


def test_no_thread_runs_before_there_is_a_page_nor_in_a_forked_process(
    folder: Path, run_python: Callable[..., str]
) -> None:
    run_python("""
import os, threading, torch
torch.set_num_threads(1)
from torch_vtensor import VTensor

def is_watched():
    return any(thread.name == "torch_vtensor watcher" for thread in threading.enumerate())

vtensor = VTensor((65536,), capacity=10, dtype=torch.uint8)
assert not is_watched()
vtensor.append(torch.ones(1, 65536, dtype=torch.uint8))
assert is_watched()
child = os.fork()
if child == 0:
    assert not is_watched()
    own = VTensor((65536,), capacity=10, dtype=torch.uint8)
    own.append(torch.ones(1, 65536, dtype=torch.uint8))
    assert is_watched()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert is_watched()
""")
