"""What is asked of continuous batching in bench_serving.py: prompts, when they come, and what was heard of each."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from transformers import GenerationConfig

__all__ = ["LOADS", "Arrivals", "AtOnce", "Chats", "Load", "Told", "greedy"]

PROMPT_MEAN, ANSWER_MEAN, SIGMA, LONGEST = 220, 200, 0.9, 2048


class Told(NamedTuple):
    """What was heard of one request; ``first_s`` from its arrival, ``next_s`` between its tokens, if there are two."""

    prompt: list[int]
    tokens: list[int]
    first_s: float
    next_s: float | None
    is_measured: bool = True  # its times count, not its tokens alone


class Load(Protocol):
    """One workload. ``num_live`` tokens are in memory at its end if nothing is there twice."""

    title: str
    num_live: int
    num_asked: int
    cuts: bool  # whether cut answers tell how long whole ones would take

    def run(self, model: Any, options: dict[str, Any], seed: int, cut: int, until: float) -> list[Told]:
        """Ask, and hear all answers.

        Args:
            options: of transformers' managers.
            seed: of the prompts, so that no run meets what another has left; 0 for a rehearsal, which is in a hurry.
            cut: answers get no more tokens than so many.
            until: when to stop, by ``time.perf_counter``; some tokens are missing then.
        """

    def rest_s(self, told: Sequence[Told], cut: int) -> float:
        """How long the rest of answers that were cut would have taken."""


class AtOnce:
    """Prompts that are all there at the beginning, through ``generate_batch()``; all begin with ``shared`` tokens."""

    cuts = True

    def __init__(
        self, title: str, num_prompts: int, num_tokens: int, num_new: int, vocab: int, shared: int = 0
    ) -> None:
        self.title = title
        self.num_live = shared + num_prompts * (num_tokens - shared + num_new)
        self.num_asked, self.sizes = num_prompts, (num_prompts, num_tokens, num_new)
        self.vocab, self.shared = vocab, shared

    def run(self, model: Any, options: dict[str, Any], seed: int, cut: int, until: float) -> list[Told]:
        num_prompts, num_tokens, num_new = self.sizes
        drawn = random.Random(seed)
        stem = drawn.choices(range(self.vocab), k=self.shared)
        prompts = [stem + drawn.choices(range(self.vocab), k=num_tokens - self.shared) for _ in range(num_prompts)]
        config = greedy(min(num_new, cut))
        outputs = model.generate_batch(prompts, generation_config=config, record_timestamps=True, **options)
        if len(outputs) != num_prompts:
            raise RuntimeError(f"{len(outputs)} of {num_prompts} requests were answered")
        return [told(output) for output in outputs.values()]

    def rest_s(self, told: Sequence[Told], cut: int) -> float:
        return max(one.next_s or 0.0 for one in told) * max(0, self.sizes[2] - cut)


class Chats:
    """Users who each go on, turn by turn, as soon as they have their answer; only the last turn's times count."""

    cuts = True

    def __init__(self, title: str, num_users: int, num_turns: int, num_asked: int, num_new: int, vocab: int) -> None:
        self.title = title
        self.num_live = num_users * num_turns * (num_asked + num_new)
        self.num_asked, self.sizes = num_users * num_turns, (num_users, num_turns, num_asked, num_new)
        self.vocab = vocab

    def run(self, model: Any, options: dict[str, Any], seed: int, cut: int, until: float) -> list[Told]:
        num_users, num_turns, num_asked, num_new = self.sizes
        drawn, vocab, found = random.Random(seed), range(self.vocab), []
        histories = [drawn.choices(vocab, k=num_asked) for _ in range(num_users)]
        turns = [1] * num_users
        config = greedy(min(num_new, cut))
        with model.continuous_batching_context_manager(generation_config=config, **options) as manager:

            def ask(user: int) -> None:
                manager.add_request(histories[user], request_id=f"{user}.{turns[user]}", record_timestamps=True)

            for user in range(num_users):
                ask(user)
            for output in answers(manager, num_users * num_turns, until):
                user = int(output.request_id.split(".")[0])
                found.append(told(output, turns[user] == num_turns))
                histories[user] = (
                    histories[user] + output.generated_tokens + drawn.choices(range(self.vocab), k=num_asked)
                )
                turns[user] += 1
                if turns[user] <= num_turns:
                    ask(user)
        return found

    def rest_s(self, told: Sequence[Told], cut: int) -> float:
        return self.sizes[1] * max(one.next_s or 0.0 for one in told) * max(0, self.sizes[3] - cut)


class Arrivals:
    """Requests that come at random, of lengths as are told of ShareGPT's: means of 220 tokens asked and 200 answered.

    The times between them are drawn from an exponential distribution, the lengths from log-normal ones.
    """

    cuts = False

    def __init__(self, title: str, num_requests: int, rate: float, vocab: int, shorter: int = 1) -> None:
        self.title = title
        drawn, at_s, self.sizes = random.Random(1), 0.0, []

        def length(mean: int) -> int:
            # A log-normal distribution's mean is exp(mu + sigma² / 2).
            return max(2, min(int(drawn.lognormvariate(0.0, SIGMA) * mean * 0.667 / shorter), LONGEST))

        for _ in range(num_requests):
            at_s += drawn.expovariate(rate)
            self.sizes.append((at_s, length(PROMPT_MEAN), length(ANSWER_MEAN)))
        self.num_asked = num_requests
        self.num_live = sum(num_asked + num_new for _, num_asked, num_new in self.sizes)
        self.vocab = vocab

    def run(self, model: Any, options: dict[str, Any], seed: int, cut: int, until: float) -> list[Told]:
        drawn, is_over = random.Random(seed), threading.Event()
        asked = [drawn.choices(range(self.vocab), k=num_asked) for _, num_asked, _ in self.sizes]
        with model.continuous_batching_context_manager(generation_config=greedy(cut), **options) as manager:

            def ask() -> None:
                began = time.perf_counter()
                for index, ((at_s, _, num_new), prompt) in enumerate(zip(self.sizes, asked, strict=True)):
                    if is_over.wait(max(0.0, began + at_s * (seed > 0) - time.perf_counter())):
                        return
                    manager.add_request(
                        prompt,
                        request_id=str(index),
                        max_new_tokens=min(num_new, cut),
                        record_timestamps=True,
                        streaming=True,
                    )

            asking = threading.Thread(target=ask)
            asking.start()
            try:
                return [told(output) for output in answers(manager, len(asked), until)]
            finally:
                is_over.set()
                asking.join()

    def rest_s(self, told: Sequence[Told], cut: int) -> float:
        return 0.0


def answers(manager: Any, num_asked: int, until: float) -> Iterator[Any]:
    """Each request's last output, as they end; what there is of the others when time is over."""
    latest: dict[str, Any] = {}
    num_ended = 0
    while num_ended < num_asked:
        output = manager.get_result(timeout=1)
        if output is not None and output.error is not None:
            raise RuntimeError(f"request {output.request_id} failed: {output.error}")
        if output is not None and output.is_finished():
            num_ended += 1
            latest.pop(output.request_id, None)
            yield output
        elif output is not None:
            latest[output.request_id] = output
        elif not manager.is_running():
            raise RuntimeError(f"the manager has ended; {num_ended} of {num_asked} requests were answered")
        if time.perf_counter() > until:
            for request_id in latest:
                manager.cancel_request(request_id)
            yield from latest.values()
            return


def told(output: Any, is_measured: bool = True) -> Told:
    """What was heard of a request."""
    if output.error is not None:
        raise RuntimeError(f"request {output.request_id} failed: {output.error}")
    times, num_next = output.timestamps, len(output.timestamps) - 1
    next_s = (times[-1] - times[0]) / num_next if num_next > 0 else None
    return Told(output.prompt_ids, output.generated_tokens, times[0] - output.created_time, next_s, is_measured)


def greedy(num_new: int) -> GenerationConfig:
    """Nothing ends an answer but its length."""
    return GenerationConfig(max_new_tokens=num_new, do_sample=False, pad_token_id=0)


def numbers(text: str) -> list[int]:
    """``32x1024x256``."""
    return [int(number) for number in text.split("x")]


LOADS: dict[str, Any] = {
    "batch": lambda it, vocab: AtOnce(f"{it.batch}: {_SIZES}, all at once", *numbers(it.batch), vocab),
    "single": lambda it, vocab: AtOnce(f"One prompt, {it.single}: tokens x new tokens", 1, *numbers(it.single), vocab),
    "chat": lambda it, vocab: Chats(f"Chat, {it.chat}: {_CHAT_SIZES}", *numbers(it.chat), vocab),
    "chats": lambda it, vocab: Chats(f"Chats, {it.chats}: {_CHAT_SIZES}", *numbers(it.chats), vocab),
    "forks": lambda it, vocab: forks(it.forks, vocab),
    "arrivals": lambda it, vocab: Arrivals(
        f"{it.requests} requests arrive, {it.rate:g} a second", it.requests, it.rate, vocab, 8 if it.quick else 1
    ),
    "nosharing": lambda it, vocab: AtOnce(f"Nothing to share, {it.nosharing}: {_SIZES}", *numbers(it.nosharing), vocab),
}
"""By name, from the parsed arguments and the number of tokens there are."""
_SIZES = "prompts x tokens x new tokens"
_CHAT_SIZES = "users x turns x tokens x new tokens"


def forks(text: str, vocab: int) -> AtOnce:
    num_branches, num_shared, num_own, num_new = numbers(text)
    title = f"Branches of one beginning, {text}: branches x shared tokens x own tokens x new tokens, all at once"
    return AtOnce(title, num_branches, num_shared + num_own, num_new, vocab, num_shared)
