"""Sequences that come, grow, fork, rest, are cancelled and share prefixes at random, while another thread moves them.

    python tests/soak/memory.py [--device cuda] [--seconds 100] [--seed N] [--gib 2]

Budgets change, drivers refuse calls, memory sleeps and wakes. Every row follows from the tokens up to it, and is looked
at on the device; at the end all memory has to be back. Prints the seed first, and what happened at the end.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import random
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from refusals import Refusing

from torch_vtensor.allocator.driver import Driver
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.prefix import Lane, PrefixTree
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import AsleepError, ClosedError, DriverError, OutOfPagesError

_LANE = Lane((1024,), (), torch.int32)  # 4 KiB a row, 512 rows a page of 2 MiB
_MOST_SEQUENCES = 24
_MOST_ROWS = 12_000
_SALTS: tuple[Hashable, ...] = (None, "alice", "bob")
_LENGTHS = (1, 1, 3, 40, 300, 1500)


@dataclass
class Sequence:
    """A tensor [1, T, 1024], the tokens of its rows, and what the rows hold, on the device."""

    vtensor: VTensor
    tokens: list[int]
    digest: int
    values: torch.Tensor
    salt: Hashable


class Soak:
    """The model: rows follow from tokens. ``step`` is one operation at random; ``move`` one on another thread."""

    def __init__(self, driver: Driver, seed: int, num_bytes: int) -> None:
        self.choose, self.moves = random.Random(seed), random.Random(seed + 1)
        self.driver = Refusing(driver)
        self.device = driver.device
        self.num_bytes = num_bytes
        self.scheduler = GrowthScheduler(PagePool(self.driver, num_bytes), num_bytes // 8, idle_seconds=0.02)
        self.tree = PrefixTree((_LANE,), scheduler=self.scheduler, max_bytes=num_bytes // 4)
        self.sequences: list[Sequence] = []
        self.columns = torch.arange(1024, dtype=torch.int32, device=self.device)
        self.num_wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        self.stems = [[self.choose.randrange(256) for _ in range(2000)] for _ in range(4)]
        self.happened: Counter[str] = Counter()

    # What sequences do

    def step(self) -> None:
        if self.choose.random() < 0.15:
            self.driver.arm(self.choose)
        steps = [self.arrive, self.turn, self.turn, self.turn, self.fork, self.rewind, self.cancel, self.record]
        step = self.choose.choice(steps if self.sequences else [self.arrive])
        with self.may_fail(step.__name__):
            step()
        if self.sequences:
            self.look_at(self.choose.choice(self.sequences))

    def arrive(self) -> None:
        if len(self.sequences) >= _MOST_SEQUENCES:
            self.sequences.pop(0).vtensor.close()
        stem = self.choose.choice(self.stems)
        tokens = [*stem[: self.choose.randrange(1, len(stem))], *self.drawn(self.choose.choice(_LENGTHS))]
        salt = self.choose.choice(_SALTS)
        loan = self.tree.fork([tokens], capacity=_MOST_ROWS, salt=salt)
        num_lent = 0 if loan is None else loan.num_rows
        vtensor = _LANE.make(1, _MOST_ROWS, self.scheduler, salt) if loan is None else loan.vtensors[0]
        self.happened["rows lent by prefixes"] += num_lent
        digest, values = self.rows_of(tokens[:num_lent], 0, salt)
        new = Sequence(vtensor, tokens[:num_lent], digest, values, salt)
        self.sequences.append(new)
        self.extend(new, tokens[num_lent:])

    def turn(self) -> None:
        self.extend(self.choose.choice(self.sequences), self.drawn(self.choose.choice(_LENGTHS)))

    def fork(self) -> None:
        it = self.choose.choice(self.sequences)
        forked = it.vtensor.fork()
        self.sequences.append(Sequence(forked, list(it.tokens), it.digest, it.values, it.salt))

    def rewind(self) -> None:
        it = self.choose.choice(self.sequences)
        length = self.choose.randrange(len(it.tokens) + 1)
        it.vtensor.truncate(length)
        it.tokens, it.values = it.tokens[:length], it.values[:length]
        it.digest, _ = self.rows_of(it.tokens, 0, it.salt)
        self.extend(it, self.drawn(3))

    def cancel(self) -> None:
        self.sequences.pop(self.choose.randrange(len(self.sequences))).vtensor.close()

    def record(self) -> None:
        it = self.choose.choice(self.sequences)
        if it.tokens:
            self.tree.record(it.tokens, [it.vtensor], 0, it.salt)

    def extend(self, it: Sequence, tokens: list[int]) -> None:
        tokens = tokens[: _MOST_ROWS - len(it.tokens)]
        digest, values = self.rows_of(tokens, it.digest, it.salt)
        it.vtensor.append((values[:, None] + self.columns)[None])
        it.tokens, it.digest, it.values = [*it.tokens, *tokens], digest, torch.cat([it.values, values])

    def look_at(self, it: Sequence) -> None:
        """Count wrong rows, on the device: nothing waits for it."""
        assert it.vtensor.length == len(it.tokens)
        with self.may_fail("look"), it.vtensor.in_place():
            self.num_wrong += (it.vtensor.tensor()[0] != it.values[:, None] + self.columns).any(1).sum()

    def rows_of(self, tokens: list[int], digest: int, salt: Hashable) -> tuple[int, torch.Tensor]:
        """What the rows of these tokens hold behind those that ``digest`` stands for, and the new digest."""
        offset = _SALTS.index(salt)
        digests = list(itertools.accumulate(tokens, lambda last, it: zlib.crc32(bytes([it]), last), initial=digest))
        values = torch.tensor([it % 1_000_000 * 3 + offset for it in digests[1:]], dtype=torch.int32)
        return digests[-1], values.to(self.device)

    def drawn(self, num_tokens: int) -> list[int]:
        return [self.choose.randrange(256) for _ in range(num_tokens)]

    @contextmanager
    def may_fail(self, what: str) -> Iterator[None]:
        try:
            yield
            self.happened[what] += 1
        except AsleepError:
            self.happened[f"{what}: asleep"] += 1
            time.sleep(0.001)
        except (OutOfPagesError, DriverError) as error:
            self.happened[f"{what}: {type(error).__name__}"] += 1

    # What another thread does to them

    def move(self) -> None:
        with suppress(IndexError):  # the last was cancelled meanwhile
            it = self.moves.choice(self.sequences)
            moves: list[tuple[str, Callable[[], object]]] = [
                ("offload", it.vtensor.offload),
                ("offload when needed", lambda: it.vtensor.offload(when_needed=True)),
                ("prefetch", it.vtensor.prefetch),
                ("budget", self.change_budget),
                ("trim", self.scheduler.trim),
                ("evict", lambda: self.tree.evict(self.num_bytes // 20)),
                ("sleep", self.sleep_and_wake),
            ]
            name, move = self.moves.choices(moves, weights=[6, 6, 6, 2, 1, 1, 1])[0]
            with self.may_fail(name), suppress(ClosedError):
                move()

    def change_budget(self) -> None:
        self.scheduler.pool.budget_bytes = self.moves.choice([None, self.num_bytes, self.num_bytes // 2])

    def sleep_and_wake(self) -> None:
        try:
            self.scheduler.sleep()
        finally:
            for tries in itertools.count():
                try:
                    self.scheduler.wake()
                    break
                except (OutOfPagesError, DriverError):
                    self.scheduler.pool.budget_bytes = None  # it may have been lowered since
                    if tries > 3:
                        self.driver.disarm()
                    assert tries < 100

    # What has to hold

    def check(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        assert int(self.num_wrong) == 0, f"{int(self.num_wrong)} rows are wrong"
        with self.scheduler.pool.lock:
            self.scheduler.pool.check_integrity()
            stats = self.scheduler.stats()
            parts = stats.live_bytes, stats.prefix_bytes, stats.parked_bytes, stats.pooled_bytes, stats.torch_bytes
            assert sum(parts) == stats.committed_bytes, stats
            if stats.budget_bytes is not None and stats.budget_bytes == self.num_bytes:
                assert stats.committed_bytes <= 2 * self.num_bytes

    def end(self) -> None:
        """Look at everything once more, let go of it, and have all memory back."""
        self.driver.disarm()
        self.scheduler.pool.budget_bytes = None
        self.scheduler.wake()
        for it in self.sequences:
            self.look_at(it)
        self.check()
        while self.sequences:
            self.sequences.pop().vtensor.close()
        self.tree.evict()
        self.scheduler.settle()
        gc.collect()
        self.scheduler.trim()
        self.scheduler.pool.check_integrity()
        stats = self.scheduler.stats()
        left = stats.committed_bytes, stats.reserved_bytes, stats.num_mappings, stats.offloaded_bytes
        assert (*left, stats.offload_pooled_bytes) == (0, 0, 0, 0, 0), stats


def run(soak: Soak, seconds: float) -> None:
    """Two threads at it for so long."""
    ends = time.monotonic() + seconds
    failed: list[BaseException] = []

    def move_on() -> None:
        try:
            while time.monotonic() < ends and not failed:
                soak.move()
                time.sleep(0.002)
        except BaseException as error:
            failed.append(error)

    mover = threading.Thread(target=move_on)
    mover.start()
    try:
        for number in itertools.count(1):
            soak.step()
            if number % 200 == 0:
                soak.check()
            if time.monotonic() >= ends or failed:
                break
    except BaseException as error:
        failed.append(error)
        raise
    finally:
        mover.join()
    if failed:
        raise failed[0]
    soak.end()


def main() -> None:
    """Run it, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--gib", type=float, default=2.0, help="the budget; it is halved and taken away at times")
    arguments = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(arguments.seconds * 3 + 300, exit=True)
    print(f"seed {arguments.seed}, {arguments.device}", flush=True)
    driver, free_before = driver_of(torch.device(arguments.device)), free_bytes(arguments.device)
    soak = Soak(driver, arguments.seed, int(arguments.gib * 2**30))
    run(soak, arguments.seconds)
    print(", ".join(f"{name} {count}" for name, count in sorted(soak.happened.items())))
    print(f"{soak.driver.num_refused} driver calls were refused")
    del soak
    gc.collect()
    leaked_bytes = free_before - free_bytes(arguments.device)
    assert leaked_bytes < 256 * 2**20, f"{leaked_bytes} bytes of the device did not come back"
    print("nothing lost, nothing leaked")


def driver_of(device: torch.device) -> Driver:
    """The device's memory."""
    if device.type == "cuda":
        from torch_vtensor.allocator.cuda_driver import CudaDriver

        return CudaDriver(device)
    from torch_vtensor.allocator.host_driver import HostDriver

    return HostDriver(64 * 1024, "/dev/shm")


def free_bytes(device: str) -> int:
    """Of a GPU what nobody uses; of the host nothing, which others use as well."""
    if not device.startswith("cuda"):
        return 0
    torch.empty(1, device=device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


if __name__ == "__main__":
    main()
