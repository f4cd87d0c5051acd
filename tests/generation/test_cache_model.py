"""A VTensorCache and a DynamicCache side by side, through random lives: every layer equal after every step.

Views that a program keeps never change, whatever happens to the cache they came from, and the memory of all caches
goes back in the end.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from paged_memory import Memory
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import torch_vtensor
from torch_vtensor.generation import layers
from torch_vtensor.generation.cache import VTensorLayer, VTensorSlidingWindowLayer

CAN_RECORD = hasattr(DynamicSlidingWindowLayer, "activate_past_recording")
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
}


class Shape(NamedTuple):
    """One layer of the model."""

    heads: int
    key_dim: int
    value_dim: int
    window: int = 0


SHAPES = (Shape(2, 16, 16), Shape(1, 24, 8), Shape(2, 16, 16), Shape(1, 16, 16, 6), Shape(1, 16, 16, 90))


class Pair:
    """The same cache twice: ``ours`` and transformers' own."""

    def __init__(self, ours: Any, theirs: Any) -> None:
        self.ours = ours
        self.theirs = theirs

    @classmethod
    def empty(cls) -> Pair:
        caches = []
        for cache, full, sliding in (
            (torch_vtensor.VTensorCache(), VTensorLayer, VTensorSlidingWindowLayer),
            (DynamicCache(), DynamicLayer, DynamicSlidingWindowLayer),
        ):
            cache.layer_class_to_replicate = None
            cache.layers = [sliding(sliding_window=shape.window) if shape.window else full() for shape in SHAPES]
            caches.append(cache)
        return cls(*caches)

    @property
    def batch(self) -> int | None:
        """The number of slots; None while there are none."""
        return max((len(layer.keys) for layer in self.theirs.layers if layer.keys is not None), default=0) or None

    @property
    def fits_together(self) -> bool:
        """Whether all layers have the same slots. One without tokens misses what happens to the others' slots."""
        return (
            len({len(layer.keys) for layer in self.theirs.layers if layer.keys is not None and layer.keys.dim() > 1})
            < 2
        )

    def both(self, act: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Do the same to both; either both refuse, for the same reason, or none does."""
        results = []
        for cache in (self.ours, self.theirs):
            try:
                results.append(act(cache))
            except Exception as error:
                results.append(type(error))
        ours, theirs = results
        refused = isinstance(ours, type), isinstance(theirs, type)
        assert refused[0] == refused[1], f"ours: {ours}, theirs: {theirs}"
        assert not refused[0] or ours is theirs, f"ours: {ours}, theirs: {theirs}"
        return ours, theirs

    def check(self) -> None:
        for ours, theirs in zip(self.ours.layers, self.theirs.layers, strict=True):
            assert ours.is_initialized == theirs.is_initialized
            assert ours.get_seq_length() == theirs.get_seq_length()
            for name in ("keys", "values"):
                assert_same(getattr(ours, name), getattr(theirs, name))


def assert_same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    """Equal tensors; how a layer without tokens says so is its own affair."""
    if theirs is None or theirs.numel() == 0:
        assert ours is None or ours.numel() == 0
    else:
        assert ours is not None
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


class CacheMachine(RuleBasedStateMachine):
    memory: ClassVar[Memory]

    @initialize()
    def start(self) -> None:
        self.pairs = [Pair.empty()]
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.mode = "no_grad"
        self.num_drawn = 0

    def tokens(self, *shape: int) -> torch.Tensor:
        """Tensors unlike those drawn before."""
        self.num_drawn += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.num_drawn))

    def pair(self, data: st.DataObject) -> Pair:
        return data.draw(st.sampled_from(self.pairs), label="cache")

    @rule(data=st.data(), num_new=st.sampled_from([1, 1, 1, 2, 7, 40, 130]), only=st.sampled_from([None, None, 0, 3]))
    def update(self, data: st.DataObject, num_new: int, only: int | None) -> None:
        pair = self.pair(data)
        if not pair.fits_together:
            return
        batch = pair.batch or data.draw(st.integers(1, 3), label="batch")
        for index, shape in enumerate(SHAPES):
            if only in (None, index):
                with MODES[self.mode]():
                    key = self.tokens(batch, num_new, shape.heads, shape.key_dim).transpose(1, 2)  # as models do
                    value = self.tokens(batch, shape.heads, num_new, shape.value_dim)
                    ours, theirs = pair.both(lambda cache, k=key, v=value, i=index: cache.update(k, v, i))
                for our, their in zip(ours, theirs, strict=True) if isinstance(ours, tuple) else ():
                    assert_same(our, their)

    @rule(data=st.data(), num_tokens=st.sampled_from([1, 2, 5, 60, 500]))
    def crop(self, data: st.DataObject, num_tokens: int) -> None:
        self.pair(data).both(lambda cache: cache.crop(-num_tokens))

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        pair = self.pair(data)
        if batch := pair.batch:
            beams = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch), label="beams")
            with MODES[self.mode]():
                index = torch.tensor(beams)
                pair.both(lambda cache: cache.reorder_cache(index))

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        pair = self.pair(data)
        if batch := pair.batch:
            slots = data.draw(st.lists(st.integers(-batch, batch - 1), min_size=1, max_size=4), label="slots")
            kind = data.draw(st.sampled_from([torch.tensor, list, tuple]), label="given as")
            with MODES[self.mode]():
                indices = kind(slots)
                pair.both(lambda cache: cache.batch_select_indices(indices))

    @rule(data=st.data(), repeats=st.integers(1, 3))
    def repeat(self, data: st.DataObject, repeats: int) -> None:
        pair = self.pair(data)
        if (pair.batch or 9) * repeats <= 8:
            with MODES[self.mode]():
                pair.both(lambda cache: cache.batch_repeat_interleave(repeats))

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        pair = self.pair(data)
        self.pairs.append(Pair(pair.ours.fork(), copy.deepcopy(pair.theirs)))

    @rule(data=st.data(), torch_save=st.booleans())
    def pickle_round_trip(self, data: st.DataObject, torch_save: bool) -> None:
        def copied(cache: Any) -> Any:
            if not torch_save:
                return pickle.loads(pickle.dumps(cache))
            file = io.BytesIO()
            torch.save(cache, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

        pair = self.pair(data)
        self.pairs[self.pairs.index(pair)] = Pair(copied(pair.ours), copied(pair.theirs))

    @rule(data=st.data(), how=st.sampled_from(["other", "clone", "tail", "head", "back"]), layer=st.integers(0, 2))
    def assign(self, data: st.DataObject, how: str, layer: int) -> None:
        """A program sets ``layer.keys`` and ``layer.values`` itself."""
        pair = self.pair(data)
        shape = pair.theirs.layers[layer].keys.shape if pair.theirs.layers[layer].get_seq_length() else ()
        if len(shape) != 4:
            return
        changed = [self.tokens(*shape[:3], SHAPES[layer].key_dim), self.tokens(*shape[:3], SHAPES[layer].value_dim)]
        start = shape[2] // 3
        for cache in (pair.ours, pair.theirs):
            held = cache.layers[layer]
            before = held.keys, held.values
            if how == "other":
                held.keys, held.values = (tensor.clone() for tensor in changed)
            elif how == "clone":
                held.keys, held.values = held.keys.clone(), held.values.clone()
            elif how == "tail":
                held.keys, held.values = held.keys[:, :, start:], held.values[:, :, start:]
            else:
                held.keys, held.values = held.keys[:, :, : shape[2] - start], held.values[:, :, : shape[2] - start]
            if how == "back":
                held.keys, held.values = before

    @rule(data=st.data(), layer=st.integers(0, len(SHAPES) - 1))
    def keep_a_view(self, data: st.DataObject, layer: int) -> None:
        held = self.pair(data).ours.layers[layer]
        if held.keys is not None:
            self.kept += [(tensor, tensor.clone()) for tensor in (held.keys, held.values[..., 1:])]

    @precondition(lambda self: len(self.kept) > 4)
    @rule()
    def let_views_go(self) -> None:
        del self.kept[:3]

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        pair = self.pair(data)
        # The stock method may write zeros to what the layer holds: to a layer's tensors that are not in our memory.
        stock = [layer for layer in pair.ours.layers if layer.is_initialized and layers.state_of(layer) is None]
        zeroed = {tensor.untyped_storage().data_ptr() for layer in stock for tensor in (layer.keys, layer.values)}
        self.kept = [kept for kept in self.kept if kept[0].untyped_storage().data_ptr() not in zeroed]
        with torch.inference_mode():  # they may have been made in it
            pair.both(lambda cache: cache.reset())

    @precondition(lambda self: CAN_RECORD)
    @rule(data=st.data())
    def record_past(self, data: st.DataObject) -> None:
        self.pair(data).both(lambda cache: [layer.activate_past_recording() for layer in cache.layers[3:]] and None)

    @rule(mode=st.sampled_from(sorted(MODES)))
    def switch_mode(self, mode: str) -> None:
        self.mode = mode

    @precondition(lambda self: len(self.pairs) > 1)
    @rule()
    def end_one(self) -> None:
        del self.pairs[0]

    @rule()
    def trim(self) -> None:
        torch_vtensor.trim()

    @invariant()
    def all_equal(self) -> None:
        for pair in self.pairs:
            pair.check()
        for view, before in self.kept:
            assert torch.equal(view, before)

    def teardown(self) -> None:
        self.pairs.clear()
        self.kept.clear()
        if sys.exc_info()[0] is None:  # otherwise its traceback holds caches
            self.memory.check_nothing_left()


def test_equals_dynamic_cache_through_any_life(memory: Memory) -> None:
    machine = type("Machine", (CacheMachine,), {"memory": memory})
    settings = hypothesis.settings(max_examples=100, stateful_step_count=30)
    run_state_machine_as_test(machine, settings=settings)


@pytest.mark.skipif(not CAN_RECORD, reason="this version cannot crop a window that has let tokens go")
def test_beams_of_a_window_that_was_cropped_by_more_than_it_has() -> None:
    """It counts fewer tokens than none, and transformers leaves the order of such a layer's slots as it is."""
    pair, window = Pair.empty(), 3
    first, second = torch.randn(2, 1, 7, 16), torch.randn(2, 1, 1, 16)
    with torch.no_grad():
        pair.both(lambda cache: cache.layers[window].activate_past_recording())
        pair.both(lambda cache: cache.update(first, first, window))
        pair.both(lambda cache: cache.layers[window].crop(-60))
        pair.both(lambda cache: cache.update(second, second, window))
        pair.both(lambda cache: cache.layers[window].reorder_cache(torch.tensor([0, 0])))
        pair.check()
