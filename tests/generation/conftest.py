"""Generation in tests: small pages, so that tiny caches are paged; each layout; nothing left behind."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
import torch
from paged_memory import PAGE_BYTES, Memory

import torch_vtensor
from torch_vtensor.allocator import pools
from torch_vtensor.generation import kv_store

_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture(autouse=True, params=["strips", "token-major"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """A process that allocated nothing yet, in the CPU's layout and in CUDA's; at the end nothing may be left."""
    monkeypatch.setenv("TORCH_VTENSOR_PAGE_BYTES", str(PAGE_BYTES))
    monkeypatch.setattr(pools, "_schedulers", {})
    if request.param == "token-major":
        monkeypatch.setattr(kv_store, "TOKEN_MAJOR_DEVICES", {"cpu", "cuda"})
    memory = Memory(request.param)
    memory.forget_appends()
    yield memory
    torch_vtensor.disable()
    if not request.node.stash[_failed]:  # otherwise its traceback holds caches
        memory.check_nothing_left()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, much slower where cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def uncompiled_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps of continuous batching that would be compiled run as they are; counters and programs are the test's."""
    from serving_models import uncompiled  # which loads operators

    yield from uncompiled(monkeypatch)
