"""Which sequences of a running batch share their first pages, and that steps are told so, and of nothing else."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from paged_memory import PAGE_BYTES
from serving_models import (
    IN_ONE_LAYOUT,
    READ_APART,
    Served,
    alone,
    config_of,
    counted,
    model_to_serve,
    prompts,
    watch_shared_reads,
)

import torch_vtensor
from torch_vtensor.generation import shared_reads
from torch_vtensor.generation.decode import step as step_module
from torch_vtensor.generation.serving.sharing import Beginning, shared_beginnings

pytestmark = IN_ONE_LAYOUT


@pytest.fixture
def reads_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[list[int]]]]:
    """The groups of every step that was told of any; their rows are compared."""
    yield watch_shared_reads(monkeypatch)
    assert counted(READ_APART) == 0


# Which groups


def beginning(*pages: int) -> Beginning:
    """Pages of ten tokens each."""
    return Beginning(array("Q", pages).tobytes(), [10 * (index + 1) for index in range(len(pages))])


@pytest.mark.parametrize(
    ("several", "expected"),
    [
        ([], set()),
        ([(1, 2)], set()),
        ([(1, 2), (3, 4)], set()),
        ([(1, 2, 3), (1, 2, 4)], {((0, 1), 20)}),
        ([(1, 2), (5,), (1, 2, 4), (), (5, 6)], {((0, 2), 20), ((1, 4), 10)}),
        ([(1, 2, 3, 4), (1, 2, 3, 5), (1, 6)], {((0, 1), 30)}),  # two of 30 save more than three of 10
        ([(1, 2), (1, 2), (1, 3), (4, 5), (4, 5)], {((0, 1), 20), ((3, 4), 20)}),
        ([(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3), (1, 2, 7), (1, 8), (1, 9)], {((0, 1, 2), 30), ((3, 4, 5), 10)}),
        ([(1, 2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 6), (1, 7)], {((0, 1), 50), ((2, 3), 10)}),
    ],
)
def test_groups_that_save_most(several: list[tuple[int, ...]], expected: set[Any]) -> None:
    found = shared_beginnings([beginning(*pages) for pages in several])
    assert {(one.slots, one.num_tokens) for one in found} == expected


def test_no_groups_save_more() -> None:
    """Against all ways to put a few sequences into groups."""
    drawn = random.Random(3)
    for _ in range(60):
        several: list[tuple[int, ...]] = []
        for _ in range(drawn.randint(2, 6)):
            stem = drawn.choice(several)[: drawn.randint(0, 4)] if several else ()
            several.append((*stem, *(drawn.randrange(10**9) for _ in range(drawn.randint(0, 3)))))
        found = shared_beginnings([beginning(*pages) for pages in several])
        saved = sum((len(one.slots) - 1) * one.num_tokens for one in found)
        for one in found:
            assert one.num_tokens == 10 * num_common([several[slot] for slot in one.slots])
        assert saved == 10 * max(
            sum((len(part) - 1) * num_common([several[slot] for slot in part]) for part in parts)
            for parts in partitions(list(range(len(several))))
        )


def test_many_who_share_in_many_ways() -> None:
    """Each of 256 has some more in common with the next: there are too many ways to look at all of them."""
    stem = tuple(range(2048))
    several = [(*stem[: 8 * index + 8], 10_000 + index) for index in range(256)]
    found = shared_beginnings([beginning(*pages) for pages in several])
    seen = [slot for one in found for slot in one.slots]
    assert len(seen) == len(set(seen))
    assert all(one.num_tokens <= 10 * num_common([several[slot] for slot in one.slots]) for one in found)
    saved = sum((len(one.slots) - 1) * one.num_tokens for one in found)
    assert saved > 0.75 * sum(10 * 8 * index for index in range(256))


def num_common(several: list[tuple[int, ...]]) -> int:
    columns = zip(*several, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pages: len(set(pages)) == 1, columns))


def partitions(slots: list[int]) -> Iterator[list[list[int]]]:
    if not slots:
        yield []
        return
    first, *others = slots
    for parts in partitions(others):
        yield [[first], *parts]
        for index, part in enumerate(parts):
            yield [*parts[:index], [first, *part], *parts[index + 1 :]]


# Steps


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", {(2, 3), (2,)}), ("gemma3", {(3,), (2,)})],  # windows have dropped what begins the second document
)
def test_steps_read_once_what_requests_share(
    family: str, expected: set[Any], is_captured: bool, reads_once: list[Any]
) -> None:
    """Two documents with questions, and one who shares nothing; as they come and go."""
    model, (first, second, other) = model_to_serve(family), prompts(150, 120, 40)
    asked = [first + tail for tail in prompts(7, 12, 9, seed=2)] + [second + tail for tail in prompts(5, 6, seed=3)]
    asked.append(other)
    lengths = [30, 6, 22, 14, 26, 30]
    with torch_vtensor.enabled(prefix_cache=True, compile=is_captured):
        served = Served(model, generation_config=config_of())
        for index, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
            served.manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
        outputs = served.run()
        served.close()
    for index, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
        assert outputs[str(index)].generated_tokens == alone(family, prompt, length), index
    sizes = {tuple(sorted(len(row) for row in groups)) for groups in reads_once}
    assert expected <= sizes
    assert counted("steps that read shared tokens once") > 0
    assert counted("finished") == len(asked)


@pytest.mark.parametrize("is_captured", [False, True])
def test_nothing_is_told_where_nothing_is_shared(is_captured: bool, reads_once: list[Any]) -> None:
    model = model_to_serve("llama")
    with torch_vtensor.enabled(prefix_cache=True, compile=is_captured):
        model.generate_batch(prompts(90, 80, 70), generation_config=config_of())
    with torch_vtensor.enabled(compile=is_captured):
        model.generate_batch([prompts(90)[0]] * 3, generation_config=config_of())
    assert reads_once == []
    assert counted("steps that read shared tokens once") == 0


def test_tenants_share_nothing(reads_once: list[Any]) -> None:
    model, (prompt,) = model_to_serve("llama"), prompts(150)
    with torch_vtensor.enabled(prefix_cache=True):
        served = Served(model, generation_config=config_of(max_new_tokens=20))
        for salt in ("alice", "bob", "alice"):
            with torch_vtensor.prefix_salt(salt):
                served.manager.add_request(prompt)
        outputs = served.run()
        served.close()
    assert [output.generated_tokens for output in outputs.values()] == [alone("llama", prompt, 20)] * 3
    assert {tuple(map(len, groups)) for groups in reads_once} == {(2,)}


def test_little_is_read_for_each(monkeypatch: pytest.MonkeyPatch, reads_once: list[Any]) -> None:
    """Reading something by itself costs more than it saves where it is little."""
    model, (prompt,) = model_to_serve("llama"), prompts(150)
    layer_bytes = 2 * 2 * 16 * 4
    assert 0 < layer_bytes * 150 < 10 * PAGE_BYTES
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", layer_bytes * 151)
    with torch_vtensor.enabled(prefix_cache=True):
        model.generate_batch([[*prompt, 5], [*prompt, 6]], generation_config=config_of())
        assert reads_once == []
        model.generate_batch([[*prompt, 5], [*prompt, 6], [*prompt, 7]], generation_config=config_of())
    assert reads_once != []


@pytest.mark.parametrize("is_captured", [False, True])
def test_a_step_that_cannot_read_once_what_is_shared(is_captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads it for each, and does not try again."""
    monkeypatch.setattr(shared_reads, "_SHARES_READS", {"cpu"})
    monkeypatch.setattr(shared_reads, "_LEAST_SAVED_BYTES", 1)
    attend, tries = step_module.cached_attention, []

    def refuse(*args: Any, groups: Any = None, num_shared: Any = None, **options: Any) -> Any:
        if groups is not None and len(groups) > 0:
            tries.append(groups)
            raise ValueError("no such kernel")
        return attend(*args, **options)

    monkeypatch.setattr(step_module, "cached_attention", refuse)
    model, (prompt,) = model_to_serve("llama"), prompts(150)
    asked = [[*prompt, last] for last in (5, 6, 7)]
    with torch_vtensor.enabled(prefix_cache=True, compile=is_captured):
        found = model.generate_batch(asked, generation_config=config_of(max_new_tokens=20))
    assert [output.generated_tokens for output in found.values()] == [alone("llama", each, 20) for each in asked]
    assert len(tries) == 1
    assert counted(READ_APART) == 1
    assert counted("uncompiled: the model's step cannot be compiled") == 0


def test_what_is_shared_survives_sleep_and_those_who_give_way(reads_once: list[Any]) -> None:
    model, (stem,) = model_to_serve("llama"), prompts(100)
    asked = [stem + tail for tail in prompts(7, 12, 9, 30, seed=2)]
    with torch_vtensor.enabled(prefix_cache=True, budget_bytes=100 * PAGE_BYTES):
        served = Served(model, generation_config=config_of(max_new_tokens=120))
        ids = served.manager.add_requests(asked)
        for _ in range(6):
            served.round()
        torch_vtensor.sleep()
        served.round()
        torch_vtensor.wake()
        outputs = served.run()
        served.close()
    assert counted("gave way") > 0
    assert reads_once != []
    for request_id, prompt in zip(ids, asked, strict=True):
        assert outputs[request_id].generated_tokens == alone("llama", prompt, 120)


def test_one_who_begins_as_another_does_waits_for_it_and_takes_no_memory(reads_once: list[Any]) -> None:
    model, (stem, other) = model_to_serve("llama"), prompts(300, 20)
    with torch_vtensor.enabled(prefix_cache=True):
        served = Served(model, generation_config=config_of(max_new_tokens=20))
        for index, each in enumerate(([*stem, 5], [*stem, 6], [*stem, 7], other)):
            served.manager.add_request(each, request_id=f"req_{index}")
        served.round()
        engine = served.engine
        begun = [request.state.request_id for request in engine.queues.active]
        assert begun == ["req_0", "req_3"], "others do not wait behind them"
        outputs = served.run()
        served.close()
    assert torch_vtensor.stats().prefixes["tokens reused"] == 600
    assert counted("tokens of prompts") == 301 + 1 + 1 + 20
    for last in (5, 6, 7):
        assert outputs[f"req_{last - 5}"].generated_tokens == alone("llama", [*stem, last], 20)
