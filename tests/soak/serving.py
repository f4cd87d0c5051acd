"""Continuous batching and sessions side by side: random arrivals, lengths, cancellations, budgets, refusals and sleep.

    python tests/soak/serving.py [--device cuda] [--seconds 100] [--seed N] [--mib 96]

A tiny model is served on a thread of its own while conversations go on, rest outside the device and fork. Whoever was
not cancelled has an answer at the end, or an error that says that memory was short; each token of an answer is the best
one, as the model sees the whole text at once. Prints the seed first, and what happened at the end.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from refusals import Refusing

import torch_vtensor
from torch_vtensor import Session
from torch_vtensor.allocator.pools import default_scheduler, set_default_budget
from torch_vtensor.errors import AsleepError, DriverError, OutOfPagesError

_VOCABULARY = 400
_MOST_UNDER_WAY = 40
_MOST_SESSIONS = 8
_LENGTHS = (1, 7, 60, 200, 700)
_ANSWERS = (1, 5, 30, 120)
_MOST_BEHIND = 0.1  # deviations of the logits; with a wrong row a token is one or more behind
_PATIENCE_S = 600


class Soak:
    """The model: what transformers' own forward says of the whole text."""

    def __init__(self, device: torch.device, seed: int, num_bytes: int) -> None:
        self.choose = random.Random(seed)
        self.num_bytes = num_bytes
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=_VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.2,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval().to(device)
        self.settings = GenerationConfig(do_sample=False, eos_token_id=[-1], pad_token_id=0)
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # of the sessions
        self.scheduler = default_scheduler(device)
        timed = self.scheduler.pool.driver
        timed.inner = self.driver = Refusing(timed.inner)  # type: ignore[assignment]
        self.stems = [self.drawn(500) for _ in range(4)]
        self.sessions: list[tuple[Session, list[int]]] = []
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.cancelled: set[str] = set()
        self.ended: dict[str, Any] = {}
        self.said: list[tuple[list[int], int]] = []  # a text, and where the first answer begins in it
        self.happened: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        torch_vtensor.enable(prefix_cache=True, budget_bytes=self.num_bytes)
        manager = self.model.init_continuous_batching(generation_config=self.settings)
        manager.start()
        self.ask(manager)
        while not self.ended:  # a manager that cannot even begin fails, and with it everybody
            self.take_up(manager, timeout=1.0)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.step(manager)
            self.take_up(manager, timeout=0.0)
        self.driver.disarm()
        set_default_budget(None)
        while self.under_way() - self.cancelled:
            self.take_up(manager, timeout=1.0)
            assert time.monotonic() < ends + _PATIENCE_S, f"no answer for {len(self.under_way() - self.cancelled)}"
        manager.stop(block=True)
        for session, _ in self.sessions:
            session.close()
        self.sessions.clear()
        torch_vtensor.disable()
        self.check_answers()

    def step(self, manager: Any) -> None:
        if self.choose.random() < 0.2:
            self.driver.arm(self.choose, is_shortage=True)
        steps = [self.ask] * 6 + [self.talk] * 3 + [self.cancel, self.rest, self.rest, self.fork, self.close]
        steps += [self.change_budget]
        steps += [self.sleep_and_wake] if self.choose.random() < 0.1 else []
        step = self.choose.choice(steps)
        with self.may_fail(step.__name__):
            step(manager)
        time.sleep(self.choose.choice([0.0, 0.0, 0.005, 0.05]))

    def ask(self, manager: Any) -> None:
        if len(self.under_way()) < _MOST_UNDER_WAY:
            request_id, tokens = str(len(self.asked)), self.prompt()
            num_new = self.choose.choice(_ANSWERS)
            self.asked[request_id] = tokens, num_new
            manager.add_request(tokens, request_id=request_id, max_new_tokens=num_new)

    def cancel(self, manager: Any) -> None:
        if waiting := sorted(self.under_way()):
            request_id = self.choose.choice(waiting)
            self.cancelled.add(request_id)
            manager.cancel_request(request_id)

    def talk(self, manager: Any) -> None:
        if len(self.sessions) < _MOST_SESSIONS and self.choose.random() < 0.4:
            self.sessions.append((Session(self.model), []))
        if not self.sessions:
            return
        session, said = self.choose.choice(self.sessions)
        turn = self.prompt() if not said else self.drawn(self.choose.choice(_LENGTHS[:3]))
        before = session.tokens
        try:
            answer = session.generate(turn, max_new_tokens=self.choose.choice((1, 9)))
        except BaseException:
            assert session.tokens == before, "a turn that failed has changed what was said"
            raise
        assert session.tokens == [*before, *turn, *answer]
        self.said.append((session.tokens, len(before) + len(turn)))
        said[:] = session.tokens

    def rest(self, manager: Any) -> None:
        if self.sessions:
            session, _ = self.choose.choice(self.sessions)
            self.choose.choice([session.offload, session.prefetch, lambda: session.offload(when_needed=True)])()

    def fork(self, manager: Any) -> None:
        if 0 < len(self.sessions) < _MOST_SESSIONS:
            session, said = self.choose.choice(self.sessions)
            self.sessions.append((session.fork()[0], list(said)))

    def close(self, manager: Any) -> None:
        if self.sessions:
            session, said = self.sessions.pop(self.choose.randrange(len(self.sessions)))
            assert session.tokens == said
            session.close()

    def change_budget(self, manager: Any) -> None:
        set_default_budget(self.choose.choice([None, self.num_bytes, self.num_bytes // 2]))

    def sleep_and_wake(self, manager: Any) -> None:
        try:
            torch_vtensor.sleep()
            time.sleep(0.05)
        finally:
            self.driver.disarm()
            set_default_budget(None)
            torch_vtensor.wake()

    @contextmanager
    def may_fail(self, what: str) -> Iterator[None]:
        try:
            yield
            self.happened[what] += 1
        except AsleepError:  # a move that was refused several times in a row leaves its rows asleep
            self.happened[f"{what}: asleep"] += 1
            self.driver.disarm()
            torch_vtensor.wake()
        except (OutOfPagesError, DriverError) as error:
            self.happened[f"{what}: {type(error).__name__}"] += 1

    def take_up(self, manager: Any, timeout: float) -> None:
        while (output := manager.get_result(timeout=timeout or 0.001)) is not None:
            if output.error is not None:
                self.happened["requests: failed"] += 1
                assert any(said in output.error for said in ("as the soak wants it", "memory")), output.error
            self.ended[output.request_id] = output

    def check_answers(self) -> None:
        for request_id, output in self.ended.items():
            prompt, num_new = self.asked[request_id]
            if output.error is None and request_id not in self.cancelled:
                assert len(output.generated_tokens) == num_new
            self.said.append(([*prompt, *output.generated_tokens], len(prompt)))
        for text, first in self.said:
            if len(text) > first:
                self.check_best(text, first)
        self.happened["answers looked at"] = len(self.said)

    def check_best(self, text: Sequence[int], first: int) -> None:
        """Of each token from ``first`` on nothing else was better, but by what other sums round."""
        with torch.no_grad():
            logits = self.model(torch.tensor([text], device=self.model.device)).logits[0, first - 1 : -1]
        told = torch.tensor(text[first:], device=logits.device)
        behind = logits.max(1).values - logits.gather(1, told[:, None])[:, 0]
        worst = float((behind / logits.std()).max())
        assert worst < _MOST_BEHIND, f"a token is {worst:.3f} deviations behind the best one"

    def under_way(self) -> set[str]:
        return self.asked.keys() - self.ended.keys() - self.cancelled

    def prompt(self) -> list[int]:
        stem = self.choose.choice(self.stems)
        return [*stem[: self.choose.randrange(len(stem))], *self.drawn(self.choose.choice(_LENGTHS))]

    def drawn(self, num_tokens: int) -> list[int]:
        return [self.choose.randrange(3, _VOCABULARY) for _ in range(num_tokens)]


def main() -> None:
    """Run it, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--mib", type=float, default=96, help="the budget; it is halved and taken away at times")
    arguments = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(arguments.seconds + _PATIENCE_S, exit=True)
    transformers.logging.set_verbosity_error()
    print(f"seed {arguments.seed}, {arguments.device}", flush=True)
    device = torch.device(arguments.device)
    soak = Soak(device, arguments.seed, int(arguments.mib * 2**20))
    soak.run(arguments.seconds)
    counts = torch_vtensor.stats().serving | soak.happened
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"{soak.driver.num_refused} driver calls were refused")
    scheduler = soak.scheduler
    del soak
    gc.collect()
    scheduler.settle()
    torch_vtensor.trim()
    scheduler.pool.check_integrity()
    stats = scheduler.stats()
    assert (stats.committed_bytes, stats.reserved_bytes, stats.offloaded_bytes) == (0, 0, 0), stats
    print("nothing lost, nothing leaked")


if __name__ == "__main__":
    main()
