"""metrics() and memory_map(): what other programs and people read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paged_memory import PAGE_BYTES, Memory

import torch_vtensor
from torch_vtensor import VTensor
from torch_vtensor.allocator.pools import default_scheduler
from torch_vtensor.allocator.recorder import Recorder, Sample
from torch_vtensor.allocator.timed_driver import TimedDriver
from torch_vtensor.generation import layers
from torch_vtensor.generation.serving import support

CPU = torch.device("cpu")
_SAMPLE = re.compile(r'(torch_vtensor_[a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\.)*",?)*)\} (\S+)')


def samples() -> dict[tuple[str, str], float]:
    """Every sample by its name and labels, read as the format says."""
    found, families = {}, {}
    text = torch_vtensor.metrics()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in families
            families[name] = kind
        elif not line.startswith("# HELP "):
            match = _SAMPLE.fullmatch(line)
            assert match, line
            assert (families[match[1]] == "counter") == match[1].endswith("_total")
            found[match[1], match[2]] = float(match[3])
    return found


def make(num_pages: int, **options: str) -> VTensor:
    vtensor = VTensor((PAGE_BYTES,), capacity=4 * num_pages, dtype=torch.uint8, **options)
    vtensor.append(torch.ones(num_pages, PAGE_BYTES, dtype=torch.uint8))
    return vtensor


def test_metrics_are_the_figures_of_stats(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    vtensor, other = make(20), make(10)
    other.offload()
    memory.settle()
    layers.counters['stock: a "reason"\\'] = 3
    monkeypatch.setitem(support.counters, "steps", 2)
    found, stats = samples(), torch_vtensor.stats().devices[CPU]
    for name in ("reserved_bytes", "committed_bytes", "live_bytes", "offloaded_bytes"):
        assert found[f"torch_vtensor_{name}", 'device="cpu"'] == getattr(stats, name)
    assert stats.offloaded_bytes >= 10 * PAGE_BYTES
    assert found["torch_vtensor_driver_calls_total", 'device="cpu",call="create"'] == stats.driver_calls["create"].count
    assert 0 < found["torch_vtensor_driver_call_seconds", 'device="cpu",call="create",quantile="0.5"'] < 60
    assert found["torch_vtensor_appends_total", r'how="stock: a \"reason\"\\"'] == 3
    assert found["torch_vtensor_serving_total", 'how="steps"'] == 2
    assert ("torch_vtensor_budget_bytes", 'device="cpu"') not in found
    with torch_vtensor.enabled(budget_bytes=2**30):
        assert samples()["torch_vtensor_budget_bytes", 'device="cpu"'] == 2**30
    vtensor.close()
    other.close()


class Bars(HTMLParser):
    """The titles of a map's bars, and whether it refers to anything outside of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert not given.keys() & {"src", "href"}
        if "title" in given:
            self.titles.append(given["title"] or "")


def bars() -> list[str]:
    parser = Bars()
    parser.feed(torch_vtensor.memory_map())
    return parser.titles


def test_the_map_shows_what_backs_every_tensor(memory: Memory, tmp_path: Path) -> None:
    assert "Nothing was allocated yet" in torch_vtensor.memory_map()
    own, source, away = make(4), make(4), make(4, tag="<away>")
    fork = source.fork()
    away.offload()
    assert torch_vtensor.memory_map(tmp_path / "map.html") == (tmp_path / "map.html").read_text()
    assert "&lt;away&gt;" in torch_vtensor.memory_map()
    kinds = [title.partition(":")[0] for title in bars()]
    assert [kinds.count(kind) for kind in ("own", "shared", "offloaded", "asleep")] == [1, 2, 1, 0]
    assert "shared: 0.02 MiB in 1 mappings" in bars()
    torch_vtensor.sleep()
    kinds = [title.partition(":")[0] for title in bars()]
    assert [kinds.count(kind) for kind in ("own", "shared", "offloaded", "asleep")] == [0, 0, 0, 4]
    torch_vtensor.wake()
    for vtensor in (own, source, away, fork):
        vtensor.close()


def test_the_page_shows_what_was_held_over_time(memory: Memory) -> None:
    assert "Over time" not in torch_vtensor.memory_map()
    torch_vtensor.record_memory(every_s=0)
    try:
        first = make(20)
        with torch_vtensor.enabled(budget_bytes=200 * PAGE_BYTES):
            fork, second = first.fork(), make(40)
        second.offload()
        peak_bytes = torch_vtensor.stats().devices[CPU].committed_bytes
        second.close()
        torch_vtensor.trim()
        recorder = default_scheduler(CPU).pool.recorder
        assert recorder is not None
        samples = recorder.samples()
        assert max(it.committed_bytes for it in samples) >= peak_bytes > samples[-1].committed_bytes
        assert max(it.offloaded_bytes for it in samples) >= 40 * PAGE_BYTES > samples[-1].offloaded_bytes
        assert max(it.shared_bytes for it in samples) >= 20 * PAGE_BYTES
        assert {it.budget_bytes for it in samples} == {None, 200 * PAGE_BYTES}
        page = torch_vtensor.memory_map()
        parser = Bars()
        parser.feed(page)  # which refers to nothing outside of itself
        for told in ("Physical memory of cpu over time", "were committed at first", "at most", 'role="img"'):
            assert told in page
        for kind in ("shared", "offloaded", "budget"):
            assert f'class="line {kind}"' in page
        for vtensor in (first, fork):
            vtensor.close()
    finally:
        torch_vtensor.record_memory(False)
    assert "Over time" not in torch_vtensor.memory_map()
    assert default_scheduler(CPU).pool.recorder is None
    for options in ({"every_s": -1}, {"most_samples": 3}):
        with pytest.raises(ValueError, match="at least 0 s, and 16 samples"):
            torch_vtensor.record_memory(**options)


def test_a_recording_may_stay_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much happens, it stays as small, covers all of the time, and ends with what there is now."""
    now, number = 0.0, 0
    monkeypatch.setattr("torch_vtensor.allocator.recorder.time", SimpleNamespace(time=lambda: now))
    recorder = Recorder(lambda time_s: Sample(time_s, number, number, 0, 0, 0, 0, None), 0.01, 32)
    for number in range(10_000):  # noqa: B007  # what the recorder looks at
        now += 0.004
        recorder.note()
    samples = recorder.samples()
    assert len(samples) <= 34
    assert (samples[0].time_s, samples[-1].time_s, samples[-1].committed_bytes) == (0, now, 9_999)
    gaps = [after.time_s - before.time_s for before, after in pairwise(samples)]
    assert max(gaps) < now / 5
    assert all(gap >= 0 for gap in gaps)


def test_driver_calls_are_ranges_if_asked_for(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ranges, seen = [], []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: open_ranges.append(name) or seen.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", open_ranges.pop)
    with make(4) as vtensor:
        assert seen == []
        driver = vtensor.scheduler.pool.driver
        assert isinstance(driver, TimedDriver)
        driver.marks_ranges = True
        vtensor.append(torch.ones(4, PAGE_BYTES, dtype=torch.uint8))
        assert {"torch_vtensor create", "torch_vtensor map", "torch_vtensor set_access"} <= set(seen)
        assert open_ranges == []
