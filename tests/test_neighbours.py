"""Processes that share one device: what one keeps idle comes to who runs short, and what is in use stays."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from worker_processes import GROW, Worker, eventually, worker

from torch_vtensor.cli import main
from torch_vtensor.settings import status_folder
from torch_vtensor.status import processes

PAGE = 65536
DEVICE_PAGES = 100
Neighbour = Callable[..., AbstractContextManager[Worker]]
PARK = "vtensor.close(); vtensor = make()"
GIB_OF_PAGES = 2**30 // PAGE


@pytest.fixture
def neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Neighbour:
    """Makes processes on a device of 100 pages that is theirs alone."""
    (tmp_path / "device").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def make(**environ: str) -> AbstractContextManager[Worker]:
        return worker(
            SHARED_DEVICE_BYTES=str(DEVICE_PAGES * PAGE), SHARED_DEVICE_FOLDER=str(tmp_path / "device"), **environ
        )

    return make


def held_pages(it: Worker) -> int:
    return next(that.figures.committed_bytes for that in processes(status_folder()) if that.pid == it.pid) // PAGE


def test_parked_and_pooled_memory_comes_to_who_runs_short(neighbour: Neighbour) -> None:
    with neighbour() as rich, neighbour() as poor:
        assert rich.do(GROW.format(60)) == "done"
        assert rich.do(PARK) == "done"
        assert rich.do(GROW.format(20)) == "done"
        assert held_pages(rich) >= 80
        assert poor.do(GROW.format(60)) == "done"
        assert held_pages(rich) <= 40
        assert rich.do("assert vtensor.tensor().unique().tolist() == [1]") == "done"
        assert poor.do(GROW.format(60)) == "out of pages"  # the rest is in use
        assert poor.do("assert vtensor.tensor().unique().tolist() == [1] and vtensor.length == 60") == "done"
        assert rich.do(GROW.format(1)) == "done"


def test_prefixes_that_nobody_uses_come_as_well(neighbour: Neighbour) -> None:
    record = (
        "from torch_vtensor.allocator.prefix import Lane, PrefixTree; "
        "tree = PrefixTree((Lane((65536,), (), torch.uint8),), scheduler=scheduler); "
        "row = VTensor((65536,), outer_shape=(1,), capacity=1000, dtype=torch.uint8); "
        "row.append(torch.ones(1, 50, 65536, dtype=torch.uint8)); tree.record(list(range(50)), [row]); row.close()"
    )
    with neighbour() as keeps, neighbour() as poor:
        assert keeps.do(record) == "done"
        assert held_pages(keeps) >= 50
        assert poor.do(GROW.format(80)) == "done"
        assert keeps.do("assert tree.match(list(range(50))) < 50") == "done"


def test_two_that_are_short_at_once_do_not_wait_for_each_other(neighbour: Neighbour) -> None:
    with neighbour() as one, neighbour() as other:
        assert one.do(GROW.format(40)) == other.do(GROW.format(40)) == "done"
        for each in (one, other):
            each.tell(GROW.format(60))
        assert [one.answer(), other.answer()] == ["out of pages", "out of pages"]
        assert one.do("assert vtensor.tensor().unique().tolist() == [1] and vtensor.length == 40") == "done"


def test_a_process_that_does_not_answer_is_not_waited_for_long(neighbour: Neighbour) -> None:
    with neighbour() as stopped, neighbour() as poor:
        assert stopped.do(GROW.format(60)) == "done"
        assert stopped.do(PARK) == "done"
        stopped.process.send_signal(signal.SIGSTOP)
        assert poor.do(GROW.format(80)) == "out of pages"
        stopped.process.send_signal(signal.SIGCONT)
        assert eventually(lambda: held_pages(stopped) < 60)
        assert poor.do(GROW.format(80)) == "done"


def test_a_killed_process_leaves_neither_memory_nor_a_file(neighbour: Neighbour) -> None:
    with neighbour() as killed, neighbour() as lives:
        assert killed.do(GROW.format(90)) == "done"
        assert lives.do(GROW.format(50)) == "out of pages"
        killed.process.kill()
        killed.process.wait()
        assert (status_folder() / str(killed.pid)).exists()
        assert lives.do(GROW.format(90)) == "done"
        assert lives.do(GROW.format(20)) == "out of pages"  # who asks meets the file, and removes it
        assert not (status_folder() / str(killed.pid)).exists()


def test_a_hidden_process_is_not_asked(neighbour: Neighbour) -> None:
    with neighbour(TORCH_VTENSOR_STATUS="0") as hidden, neighbour() as poor:
        assert hidden.do(GROW.format(60)) == "done"
        assert hidden.do(PARK) == "done"
        assert poor.do(GROW.format(80)) == "out of pages"


@pytest.mark.gpu
def test_processes_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a third process leaves them less than both would like to have."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with worker(WORKER_DEVICE="cuda") as rich, worker(WORKER_DEVICE="cuda") as poor:
        assert poor.do("vtensor.commit(1)") == "done"
        assert rich.do(f"vtensor.commit({3 * GIB_OF_PAGES})") == "done"
        assert rich.do(PARK) == "done"
        assert held_pages(rich) >= 3 * GIB_OF_PAGES
        rest = torch.empty(torch.cuda.mem_get_info()[0] - 2**30, dtype=torch.uint8, device="cuda")
        assert poor.do(f"vtensor.commit({3 * GIB_OF_PAGES})") == "done"
        assert held_pages(rich) < 2 * GIB_OF_PAGES
        assert poor.do(f"vtensor.commit({6 * GIB_OF_PAGES})") == "out of pages"
        del rest
        torch.cuda.empty_cache()
        assert poor.do(PARK) == "done"
        assert main(["limit", str(poor.pid), "1GiB"]) == 0
        assert eventually(lambda: held_pages(poor) <= GIB_OF_PAGES)
        assert rich.do("import torch_vtensor, contextlib; stack = contextlib.ExitStack()") == "done"
        assert rich.do("stack.enter_context(torch_vtensor.memory_pool('cuda'))") == "done"
        assert rich.do("weights = torch.ones(2**30, dtype=torch.uint8, device='cuda'); stack.close()") == "done"
        (shown,) = (it for it in processes(status_folder()) if it.pid == rich.pid)
        assert shown.figures.torch_bytes >= 2**30
