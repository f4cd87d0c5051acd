"""PrefixTree: sequences that were computed before, in pages that later sequences begin with.

A radix tree over token ids. Each node holds tokens [start, stop) that its children have in common, and references to
the pages that those tokens' rows lie in: no addresses, and no copy of what the sequence wrote.

    root ── "You are a helpful …" ─┬─ " What is a page?"  ─── " A page is …"
                                   └─ " Translate: …"

    pages     [ 7 ][ 2 ][ 9 ]
                        [ 9 ][ 4 ][ 5 ]       a page on the edge of two nodes is held by both; where the sequences
                        [ 8 ][ 3 ]            parted inside it, by each in the version that its own sequence wrote

Any prefix of any recorded sequence can be lent, down to the token.
"""

from __future__ import annotations

import heapq
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

from torch_vtensor.allocator.captures import no_captures
from torch_vtensor.allocator.driver import Fence
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import Page, PagePool, Tier
from torch_vtensor.allocator.page_run import PageRun, common_bound
from torch_vtensor.allocator.prefix_loan import Lane, Source, lend
from torch_vtensor.allocator.vtensor import VTensor

__all__ = ["MOST_MAPPINGS", "Lane", "Loan", "Pin", "PrefixExplanation", "PrefixStats", "PrefixTree"]

_KEPT_FRACTION = 4  # of the pool's limit, that prefixes may hold in all
# Half of what a process may have: of 65,530 maps (Linux), of the about 520,000 that drivers were seen to take (CUDA).
MOST_MAPPINGS = {"cpu": 32_000, "cuda": 260_000}


class Loan(NamedTuple):
    """New tensors, one a lane, whose slots hold ``num_rows`` rows each; the caller's own from now on."""

    vtensors: list[VTensor]
    num_rows: int


class PrefixStats(NamedTuple):
    """What a tree holds, and what it did. Counts of tokens; bytes of the pages it holds, in use elsewhere or not."""

    num_nodes: int
    num_tokens: int
    num_pinned_nodes: int
    held_bytes: int
    max_bytes: int
    num_asked_tokens: int
    num_lent_tokens: int
    num_recorded_tokens: int
    num_evicted_tokens: int
    num_copies_for_mappings: int


class PrefixExplanation(NamedTuple):
    """What a request for a sequence would get, and why no more."""

    num_tokens: int
    num_cached: int
    num_shared: int
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.num_cached} of {self.num_tokens} tokens, {self.num_shared} of them in shared pages: {self.reason}"
        )


class _Node:
    """Tokens that follow those of ``parent``, and the pages of a sequence that has them."""

    __slots__ = ("children", "is_queued", "last_used", "num_pins", "parent", "runs", "start", "tokens", "written")

    def __init__(self, parent: _Node | None, start: int, tokens: tuple[int, ...], runs: list[PageRun]) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.runs = runs
        self.children: dict[int, _Node] = {}
        self.num_pins = 0
        self.last_used = 0
        self.is_queued = False
        self.written: Fence | None = None  # what has to be done on the device before the rows are there

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    def pages(self) -> list[Page]:
        return [page for run in self.runs for page in run.pages()]

    def uses(self) -> Iterator[bool]:
        """For every page, whether somebody maps it."""
        return (page.num_refs > page.num_held for page in self.pages())

    def gives_nothing(self) -> Iterator[bool]:
        """For every page, whether the device would get nothing for it: somebody maps it, or it is not there."""
        return (page.num_refs > page.num_held or page.tier is not Tier.DEVICE for page in self.pages())


class Pin:
    """Keeps a prefix from being evicted until ``release``, or the end of a ``with`` block."""

    def __init__(self, tree: PrefixTree, node: _Node) -> None:
        self._tree = tree
        self._node: _Node | None = node
        node.num_pins += 1

    def release(self) -> None:
        """Let the prefix be evicted again. Releasing twice is fine."""
        with self._tree.pool.lock:
            if self._node is not None:
                self._node.num_pins -= 1
                self._node = None

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class PrefixTree:
    """Remembers sequences by their tokens and lends their rows to later ones, by mapping the same pages.

    Args:
        lanes: the tensors that every sequence lies in, for example a layer's keys and its values.
        scheduler: whose pages they are.
        max_bytes: how much memory the tree may hold, in pages that nobody else uses or that somebody does. Default: a
            quarter of the pool's limit. Under pressure it holds less: the pool takes parked ranges
            first, then what this tree used least recently and nobody maps, and only then refuses.
        max_mappings: how many mappings the pool may have for pages to be shared; past it they are copied, which needs
            fewer. Default: half of what the device's driver allows.

    Tenants: sequences are remembered under a ``salt`` and found under no other. Memory that passes from one salt to
        another is overwritten with zeros (``PagePool``), and a tensor can be recorded only under the salt that it has.
    Effects: holds pages until they are evicted or the tree is gone.
    Source:  vTensor (arXiv 2407.15309) section 4.2, the rTree with rPush and rPrefixMatch. There a node is a whole
        chunk of tokens; here prefixes end anywhere, and of the last page the rows before the end are copied.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        *,
        scheduler: GrowthScheduler,
        max_bytes: int | None = None,
        max_mappings: int | None = None,
    ) -> None:
        self.lanes = tuple(lanes)
        self.scheduler = scheduler
        self.pool: PagePool = scheduler.pool
        self.held_bytes = 0
        self._max_bytes = max_bytes
        self._max_mappings = MOST_MAPPINGS[self.pool.device.type] if max_mappings is None else max_mappings
        self._roots: dict[Hashable, _Node] = {}
        self._num_holds: Counter[Page] = Counter()  # by the nodes of this tree: another one may hold the page as well
        self._queue: list[tuple[int, int, _Node]] = []  # every leaf, once, by when it was used; touched ones too early
        self._clock = itertools.count(1)
        self._num_asked = self._num_lent = self._num_recorded = self._num_evicted = self._num_copies = 0
        tree = weakref.ref(self)

        def relieve(nbytes: float) -> None:
            alive = tree()
            if alive is not None:
                # All is for those who want prefixes gone; otherwise it is the device that is short of memory.
                look = _Node.uses if nbytes == math.inf else _Node.gives_nothing
                for spares in (lambda node: any(look(node)), lambda node: all(look(node))):
                    alive._evict_until(lambda: alive.pool.ledger.free_bytes >= nbytes, spares)

        self.pool.evictors.append(relieve)
        weakref.finalize(self, _forsake, scheduler, relieve, self._roots).atexit = False

    @property
    def max_bytes(self) -> int:
        """How many bytes of pages the tree holds at most."""
        if self._max_bytes is not None:
            return self._max_bytes
        return self.pool.limit_bytes // _KEPT_FRACTION

    def match(self, tokens: Sequence[int], salt: Hashable = None) -> int:
        """How many of the first ``tokens`` are cached."""
        with self.pool.lock:
            return self._walk(tuple(tokens), salt)[1]

    def record(self, tokens: Sequence[int], vtensors: Sequence[VTensor], slot: int = 0, salt: Hashable = None) -> int:
        """Remember that slot ``slot`` of ``vtensors`` holds the rows of ``tokens``; returns how many of them are new.

        Effects: the pages of those that are new are held; the tensors go on as before, behind the last of the tokens,
            and move away before they overwrite one. What was used least recently goes until ``max_bytes`` are kept.
            Nothing is recorded while the current stream is being captured into a graph.
        Raises:  ValueError for tensors of other lanes, of another salt, or without all of the rows.
        """
        with self.pool.lock:
            num_new = self._remember(tuple(tokens), vtensors, slot, salt)
            self._evict_until(self._fits)
            return num_new

    def keep(self, tokens: Sequence[int], vtensors: Sequence[VTensor], slot: int = 0, salt: Hashable = None) -> Pin:
        """``record`` and ``pin`` at once: what is recorded may be more than ``max_bytes``, and stays until released.

        Raises: as ``record``; ValueError where nothing can be recorded now.
        """
        with self.pool.lock:
            self._remember(tuple(tokens), vtensors, slot, salt)
            pin = self.pin(tokens, salt)
            self._evict_until(self._fits)
            return pin

    def fork(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        capacity: int,
        paddings: Sequence[int] | None = None,
        at_least: int = 1,
        at_most: int | None = None,
        salt: Hashable = None,
    ) -> Loan | None:
        """New tensors whose slots begin with the longest prefixes that are cached of all of ``sequences``.

        Args:
            sequences: a slot each; repeats share everything.
            capacity: rows of addresses of the new tensors.
            paddings: rows of zeros in front of each slot's sequence. Such a slot gets copies.
            at_least: rows, without padding, that are worth it: of the slot that would get the most. What is pinned is
                worth it at any length.
            at_most: rows that every slot may have at most, padding included.

        Effects: see ``prefix_loan.lend``. All slots are equally long, as long as the one of which the least is cached.
            The current stream's next work comes after that by which the rows were written.
        Returns: None if that is less than is worth it, or while the stream is being captured into a graph, which would
            copy at every replay.
        Raises:  OutOfPagesError or DriverError, with everything as it was.
        """
        paddings = [0] * len(sequences) if paddings is None else paddings
        with self.pool.lock:
            if self.pool.driver.is_capturing():
                return None
            keys = [tuple(tokens) for tokens in sequences]
            walks = {key: self._walk(key, salt) for key in set(keys)}
            self._num_asked += sum(map(len, keys))
            num_rows = min(padding + walks[key][1] for key, padding in zip(keys, paddings, strict=True))
            num_rows = num_rows if at_most is None else min(num_rows, at_most)
            if num_rows - min(paddings) < at_least and not any(
                node.num_pins and node.stop <= num_rows - padding
                for key, padding in zip(keys, paddings, strict=True)
                for node in walks[key][0]
            ):
                return None
            num_lent = sum(max(num_rows - padding, 0) for padding in paddings)
            for node in {id(node): node for path, _ in walks.values() for node in path}.values():
                if node.written is not None and node.written.passed():
                    node.written = None
                if node.written is not None:
                    node.written.order_after()
            wanted = list(zip(keys, paddings, strict=True))
            sources = {(key, padding): self._source(walks[key][0], num_rows, padding) for key, padding in set(wanted)}
            kept = [page for source in sources.values() for run in source.runs for page in run.pages()]
            self.pool.share(kept)  # what is lent cannot be evicted meanwhile: others need not wait until it is mapped
        try:
            vtensors, is_copy = lend(
                self.lanes,
                [sources[one] for one in wanted],
                num_rows,
                capacity,
                self.scheduler,
                salt,
                self._max_mappings,
            )
        finally:
            self.pool.drop(kept)
        with self.pool.lock:
            self._num_lent += num_lent
            self._num_copies += is_copy
        return Loan(vtensors, num_rows)

    def pin(self, tokens: Sequence[int], salt: Hashable = None) -> Pin:
        """Keep this prefix, whatever else is evicted, until the pin is released.

        Raises: ValueError unless all of it is cached.
        """
        with self.pool.lock:
            path, num_known = self._walk(tuple(tokens), salt)
            if not tokens or num_known < len(tokens):
                raise ValueError(f"pin {len(tokens)} tokens: {num_known} of them are cached; record them first")
            return Pin(self, self._split(path[-1], num_known))

    def evict(self, nbytes: float = math.inf) -> int:
        """Let go of what was used least recently, until ``nbytes`` are free or only pinned prefixes are left.

        Returns: bytes of pages that are free now and were not before.
        """
        with self.pool.lock:
            free_bytes = self.pool.ledger.free_bytes
            self._evict_until(lambda: self.pool.ledger.free_bytes - free_bytes >= nbytes)
            return self.pool.ledger.free_bytes - free_bytes

    def stats(self) -> PrefixStats:
        """Exact figures of this tree, at this moment."""
        with self.pool.lock:
            nodes = list(self._nodes())
            return PrefixStats(
                num_nodes=len(nodes),
                num_tokens=sum(len(node.tokens) for node in nodes),
                num_pinned_nodes=sum(node.num_pins > 0 for node in nodes),
                held_bytes=self.held_bytes,
                max_bytes=self.max_bytes,
                num_asked_tokens=self._num_asked,
                num_lent_tokens=self._num_lent,
                num_recorded_tokens=self._num_recorded,
                num_evicted_tokens=self._num_evicted,
                num_copies_for_mappings=self._num_copies,
            )

    def explain(self, tokens: Sequence[int], salt: Hashable = None) -> PrefixExplanation:
        """Say what ``fork`` would lend for one sequence, and why no more."""
        with self.pool.lock:
            path, num_known = self._walk(tuple(tokens), salt, touch=False)
            if num_known == 0:
                others = "" if salt in self._roots or not self._roots else f" under salt {salt!r}, only under others"
                return PrefixExplanation(len(tokens), 0, 0, f"no sequence that begins like this is cached{others}")
            runs = self._source(path, num_known, 0).runs
            ends = [run.whole_until(num_known * lane.row_bytes).bounds[-1] // lane.row_bytes
                    for run, lane in zip(runs, self.lanes, strict=True)]  # fmt: skip
            num_mappings = self.pool.num_mappings + sum(len(run.sizes) * len(run.strips) for run in runs)
            if num_mappings > self._max_mappings:
                ends = [0]
            if num_known == len(tokens):
                reason = "all of it was recorded"
            else:
                reason = f"no cached sequence has token {tokens[num_known]} next"
            if ends == [0]:
                reason += f"; the {self._max_mappings} mappings would be used up, so it is copied"
            return PrefixExplanation(len(tokens), num_known, min(ends), reason)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every node's pages cover its tokens and meet those of the nodes before it."""
        with self.pool.lock:
            held: set[Page] = set()
            for node in self._nodes():
                assert node.tokens and node.parent is not None, "a node has no tokens"
                assert node.parent.stop == node.start and node.parent.children[node.tokens[0]] is node, "a wrong parent"
                path = [node]
                while path[0].parent is not None:
                    path.insert(0, path[0].parent)
                for index, lane in enumerate(self.lanes):
                    run, nbytes = node.runs[index], node.stop * lane.row_bytes
                    assert run.bounds[0] <= node.start * lane.row_bytes, "a node's pages begin behind its tokens"
                    assert run.bounds[-1] >= nbytes, "a node's pages end before its tokens"
                    whole = self._run(path, index, nbytes)
                    assert whole.bounds[0] == 0 and whole.bounds[-1] >= nbytes, "the pages of a path have a gap"
                    for strip in (*run.strips, *whole.strips):
                        assert all(page.num_held > 0 for page in strip), "a node's page is not held"
                held.update(node.pages())
                assert node.children or node.is_queued, "a leaf is not among those to be evicted"
            assert len(self._queue) <= sum(1 for _ in self._nodes()), "more nodes are to be evicted than there are"
            held_bytes = sum(page.nbytes for page in held)
            assert held_bytes == self.held_bytes, f"{held_bytes} bytes are held and {self.held_bytes} counted"

    # Inside

    def _walk(self, tokens: tuple[int, ...], salt: Hashable, *, touch: bool = True) -> tuple[list[_Node], int]:
        """The nodes from the root on that ``tokens`` lead along, and how many of the tokens they have."""
        node = None if self.pool.is_foreign else self._roots.get(salt)
        path: list[_Node] = []
        num_known = 0
        while node is not None:
            path.append(node)
            if num_known < node.stop or num_known == len(tokens):
                break
            node = node.children.get(tokens[num_known])
            if node is not None:
                num_known += _num_common(node.tokens, tokens, num_known)
        if touch and path:
            now = next(self._clock)
            for node in path:
                node.last_used = now
        return path, num_known

    def _remember(self, tokens: tuple[int, ...], vtensors: Sequence[VTensor], slot: int, salt: Hashable) -> int:
        """Add a node for those of the tokens that are new; returns how many they are."""
        if tuple(map(Lane.of, vtensors)) != self.lanes:
            raise ValueError(f"tensors of {[Lane.of(vtensor) for vtensor in vtensors]}: this tree is of {self.lanes}")
        if any(vtensor.salt != salt for vtensor in vtensors):
            raise ValueError(
                f"the tensors' salts are {[vtensor.salt for vtensor in vtensors]}, and they are to be found under "
                f"{salt!r}: what one tenant computed is not lent to another"
            )
        with ExitStack() as held:
            if self.pool.is_foreign or not tokens or not no_captures(self.pool.driver, held):
                return 0
            path, num_known = self._walk(tokens, salt)
            if num_known < len(tokens):
                runs = [vtensor.lend(slot, len(tokens)) for vtensor in vtensors]
                if not path:
                    path = [self._roots.setdefault(salt, self._make_root(runs))]
                self._add(path, tokens, num_known, runs)
                self._num_recorded += len(tokens) - num_known
            return len(tokens) - num_known

    def _source(self, path: list[_Node], num_rows: int, padding: int) -> Source:
        padding = min(padding, num_rows)
        nbytes = [(num_rows - padding) * lane.row_bytes for lane in self.lanes]
        return Source(tuple(self._run(path, index, end) for index, end in enumerate(nbytes)), padding)

    def _run(self, path: list[_Node], lane: int, nbytes: int) -> PageRun:
        """The pages up to offset ``nbytes`` of the sequence along ``path``: of each the latest version."""
        later = [path[-1].runs[lane].covering(nbytes)]
        for node in reversed(path[:-1]):
            before = node.runs[lane].whole_until(later[-1].bounds[0])
            if before.sizes:
                later.append(before)
        return PageRun.joined(later[::-1])

    def _make_root(self, runs: list[PageRun]) -> _Node:
        return _Node(None, 0, (), [PageRun((0,), tuple(() for _ in run.strips)) for run in runs])

    def _add(self, path: list[_Node], tokens: tuple[int, ...], num_known: int, runs: list[PageRun]) -> None:
        """A node for the tokens from ``num_known`` on, whose sequence lies in ``runs``, behind the end of ``path``."""
        own = []
        for index, (lane, run) in enumerate(zip(self.lanes, runs, strict=True)):
            nbytes = num_known * lane.row_bytes
            own.append(run.since(common_bound([self._run(path, index, nbytes), run], nbytes)))
        parent = self._split(path[-1], num_known)
        node = _Node(parent, num_known, tokens[num_known:], own)
        node.last_used = next(self._clock)
        node.written = self.pool.driver.fence()
        self._hold(node.pages())
        parent.children[tokens[num_known]] = node
        self._enqueue(node)

    def _split(self, node: _Node, at: int) -> _Node:
        """Have a node that ends at token ``at``, which lies in ``node``; returns it."""
        if at == node.stop:
            return node
        before, after = node.tokens[: at - node.start], node.tokens[at - node.start :]
        assert before and node.parent is not None
        edges = [at * lane.row_bytes for lane in self.lanes]
        runs = [run.covering(edge) for run, edge in zip(node.runs, edges, strict=True)]
        upper = _Node(node.parent, node.start, before, runs)
        upper.last_used, upper.written = node.last_used, node.written
        upper.children[after[0]] = node
        held = node.pages()
        node.runs = [run.since(edge) for run, edge in zip(node.runs, edges, strict=True)]
        self._hold(upper.pages() + node.pages())
        self._let_go(held)
        node.parent.children[before[0]] = upper
        node.parent, node.start, node.tokens = upper, at, after
        return upper

    def _evict_until(
        self, is_enough: Callable[[], bool], is_spared: Callable[[_Node], bool] = lambda node: False
    ) -> None:
        """Remove leaves, the least recently used first, until it is enough.

        Args:
            is_spared: whether a node stays; where all of its pages are mapped by somebody, to let go of them would
                free nothing.
        """
        with self.pool.lock:
            if self.pool.is_foreign:
                return
            staying = []
            while self._queue and not is_enough():
                last_used, order, node = heapq.heappop(self._queue)
                if node.children:
                    node.is_queued = False  # until it is a leaf again
                elif last_used < node.last_used:
                    heapq.heappush(self._queue, (node.last_used, order, node))
                elif node.num_pins or is_spared(node):
                    staying.append((last_used, order, node))
                else:
                    self._remove(node)
            for entry in staying:
                heapq.heappush(self._queue, entry)

    def _fits(self) -> bool:
        return self.held_bytes <= self.max_bytes

    def _remove(self, leaf: _Node) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.tokens[0]]
        self._let_go(leaf.pages())
        self._num_evicted += len(leaf.tokens)
        if parent.children:
            return
        if parent.parent is not None:
            self._enqueue(parent)
        else:
            del self._roots[next(salt for salt, root in self._roots.items() if root is parent)]

    def _enqueue(self, leaf: _Node) -> None:
        if not leaf.is_queued:
            leaf.is_queued = True
            heapq.heappush(self._queue, (leaf.last_used, next(self._clock), leaf))

    def _hold(self, pages: Sequence[Page]) -> None:
        self.pool.hold(pages)
        for page in pages:
            self._num_holds[page] += 1
            if self._num_holds[page] == 1:
                self.held_bytes += page.nbytes

    def _let_go(self, pages: Sequence[Page]) -> None:
        for page in pages:
            self._num_holds[page] -= 1
            if self._num_holds[page] == 0:
                del self._num_holds[page]
                self.held_bytes -= page.nbytes
        self.pool.let_go(pages)

    def _nodes(self) -> Iterator[_Node]:
        """Every node but the roots."""
        return _below(self._roots.values())


def _below(nodes: Iterable[_Node]) -> Iterator[_Node]:
    waiting = [child for node in nodes for child in node.children.values()]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children.values()


def _num_common(edge: tuple[int, ...], tokens: tuple[int, ...], start: int) -> int:
    """How many tokens ``edge`` and ``tokens[start:]`` begin with in common, by comparing slices."""
    same, differ = 0, min(len(edge), len(tokens) - start)
    if edge[:differ] == tokens[start : start + differ]:
        return differ
    while differ - same > 1:
        middle = (same + differ) // 2
        if edge[same:middle] == tokens[start + same : start + middle]:
            same = middle
        else:
            differ = middle
    return same


def _forsake(scheduler: GrowthScheduler, relieve: Callable[[float], None], roots: dict[Hashable, _Node]) -> None:
    """What is left to do when a tree is gone, on whatever thread that is noticed."""
    scheduler.pool.evictors.remove(relieve)
    scheduler.let_go_soon([page for node in _below(roots.values()) for page in node.pages()])
