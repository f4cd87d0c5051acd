"""sleep() and wake() of everything that a process has, by tag."""

from collections.abc import Iterator

import pytest
import torch

import torch_vtensor
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import AsleepError, DriverError


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    torch_vtensor.wake()
    torch_vtensor.trim()
    assert torch_vtensor.stats().devices[torch.device("cpu")].offloaded_bytes == 0


def make(num_rows: int, **options: str) -> VTensor:
    vtensor = VTensor((1000,), capacity=1000, **options)
    vtensor.append(torch.full((num_rows, 1000), float(num_rows)))
    return vtensor


def test_everything_sleeps_and_wakes() -> None:
    with make(100) as vtensor, make(50, tag="weights") as weights:
        view, committed_bytes = vtensor.tensor(), vtensor.committed_bytes + weights.committed_bytes
        assert torch_vtensor.sleep() >= committed_bytes
        assert torch_vtensor.sleep() == 0
        assert "offloaded" in str(torch_vtensor.stats())
        with pytest.raises(AsleepError):
            vtensor.tensor()
        assert torch_vtensor.wake() == committed_bytes
        assert (view.unique().tolist(), weights.tensor().unique().tolist()) == ([100], [50])
        del view


def test_weights_are_kept_and_caches_discarded() -> None:
    with make(100) as cache, make(50, tag="weights") as weights:
        torch_vtensor.sleep(discard="kv_cache")
        torch_vtensor.wake("weights")
        assert (cache.is_asleep, weights.tensor().unique().tolist()) == (True, [50])
        torch_vtensor.wake(["kv_cache"])
        assert cache.tensor().unique().tolist() == [0]
        torch_vtensor.sleep("weights", discard=True)
        torch_vtensor.wake(device="cpu")
        assert weights.tensor().unique().tolist() == [0]


def test_only_the_named_devices_sleep() -> None:
    with make(10) as vtensor:
        assert torch_vtensor.sleep(device="cuda") == 0
        assert not vtensor.is_asleep


def test_an_unknown_tag_is_refused() -> None:
    with make(10, tag="adapter") as vtensor:
        for call in (torch_vtensor.sleep, torch_vtensor.wake):
            with pytest.raises(ValueError, match=r"'kv_cahce'.*adapter, kv_cache, weights"):
                call("kv_cahce")
        with pytest.raises(ValueError, match="'other'"):
            torch_vtensor.sleep(discard=["other"])
        assert not vtensor.is_asleep


def test_devices_that_slept_are_woken_when_another_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_vtensor.allocator import sleeping

    class Refusing:
        """A device that does not let go."""

        pool = default_scheduler(torch.device("cpu")).pool

        def sleep(self, tags: object, discard: object) -> int:
            raise DriverError("unmap", "EIO", torch.device("cpu"), 1)

    with make(100) as vtensor:
        schedulers = {torch.device("cpu"): default_scheduler(torch.device("cpu")), torch.device("cuda", 0): Refusing()}
        with monkeypatch.context() as patched:
            patched.setattr(sleeping, "all_schedulers", lambda: schedulers)
            with pytest.raises(DriverError):
                torch_vtensor.sleep()
        assert vtensor.tensor().unique().tolist() == [100]
