"""Session: a conversation with a model that runs only new tokens, branches by sharing pages, and can be put on disk.

    tokens   [ system, question, answer, question, answer ]      what was said: a session is these
    cache    [ rows ========================= ]                  of a beginning of them, all but the last as a rule

Whatever happens in between, the cache holds the rows of a beginning of the tokens: what is taken back or has failed is
cut off, and the next turn runs what is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from torch_vtensor.allocator.prefix import Pin
from torch_vtensor.errors import ClosedError
from torch_vtensor.generation import prefix_cache, session_file
from torch_vtensor.generation._transformers_compat import (
    CACHE_NAME,
    DynamicSlidingWindowLayer,
    GenerationConfig,
    GenerationMixin,
)
from torch_vtensor.generation.cache import CacheMemory, VTensorCache
from torch_vtensor.generation.cached_rows import ROWS_BEHIND, Checkpoint, checkpoint_of, most_lendable, shorten
from torch_vtensor.generation.enable import keeps_prefixes
from torch_vtensor.generation.in_use import call_with, in_use
from torch_vtensor.generation.report import why_all_stock
from torch_vtensor.generation.tenant import current_salt, prefix_salt
from torch_vtensor.generation.turns import Turn, are_messages, checked_settings, known_tokens, num_common, tokens_of

__all__ = ["Prefix", "Session"]


class Prefix:
    """Tokens that were run once and whose pages sessions of the model begin with, until ``release`` or a block's end.

    Sessions that have begun with them keep them for themselves.
    """

    def __init__(self, num_tokens: int, pin: Pin) -> None:
        self.num_tokens = num_tokens
        self._pin: Pin | None = pin

    def release(self) -> None:
        """Let the memory go as soon as no session uses it. Releasing twice is fine.

        Under ``enable(prefix_cache=True)`` what was a prefix stays, as what any call has left, until room is needed.
        """
        if self._pin is not None:
            self._pin.release()
        self._pin = None  # which holds the pages of a model that has changed since
        if not keeps_prefixes():
            prefix_cache.clear()

    def __enter__(self) -> Prefix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Session:
    """One conversation with a model: every turn runs only what was not run before; patches nothing.

    Args:
        model: a decoder-only transformers model that can ``generate()``.
        tokenizer: for turns that are text, and for ``chat``.

    A session belongs to the tenant in whose ``prefix_salt`` block it was made, and to one thread at a time. Where
        ``enable(compile=True)`` is on, its turns are decoded so. Where a prefix of the model's is kept that its first
        turn begins with, it begins with those pages.
    Limits:  one sequence. Sliding windows drop tokens for good: a session goes back to the beginning of its last turn
        at little cost, and farther back by running all of its tokens again at its next turn; or fork it before. Weights
        that change between turns are for the caller to notice: a new session over ``tokens`` runs them all again.
    Raises:  TypeError for what is no model; ValueError for one whose past is more than keys and values, or not in our
        memory, with the reason.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        if not isinstance(model, GenerationMixin):
            raise TypeError(f"a session takes a transformers model that can generate(), not a {type(model).__name__}")
        reason = prefix_cache.why_never(model) or why_all_stock(model)
        if reason is not None:
            raise ValueError(f"no session over {type(model).__name__}: {reason}. Use its generate() as it is.")
        self.model = model
        self.tokenizer = tokenizer
        self.messages: list[dict[str, Any]] = []
        """What ``chat`` has said so far, and what it goes on from: change it, and the next turn runs what differs."""
        self._salt = current_salt()
        self._tokens = torch.empty(0, dtype=torch.int64, device="cpu")
        self._num_chatted = 0  # how many of them ``messages`` tell of; ``generate`` has added the others
        self._answer_ends: dict[int, int] = {}  # by an answer's index in ``messages``, where in the tokens it ends
        self._checkpoint: Checkpoint | None = None  # where the last turn began, as far as sliding windows go
        self._cache: VTensorCache | None = VTensorCache(config=model.config)

    # What was said

    @property
    def tokens(self) -> list[int]:
        """Everything said so far, answers included."""
        self._open()
        tokens: list[int] = self._tokens.tolist()
        return tokens

    @property
    def length(self) -> int:
        """How many tokens were said so far."""
        self._open()
        return len(self._tokens)

    @property
    def num_cached(self) -> int:
        """How many of them the next turn does not run again."""
        return int(self._open().get_seq_length())

    def memory(self) -> CacheMemory:
        """Where the bytes of this session's cache are; ``shared_bytes`` are also others', or an earlier window's."""
        return self._open().memory()

    def offload(self, *, when_needed: bool = False) -> int:
        """Let others have this session's memory until its next turn; returns the bytes that left the device.

        Args:
            when_needed: only when another session, or cache, would find no memory otherwise.

        Effects: as of ``torch_vtensor.offload``; the next turn brings the tokens back, or ``prefetch`` before it.
        """
        return self._open().offload(when_needed=when_needed)

    def prefetch(self) -> int:
        """Bring this session's tokens back to the device before its next turn; returns the bytes that came.

        Raises: OutOfPagesError, with all tokens where they were.
        """
        return self._open().prefetch()

    def __repr__(self) -> str:
        if self._cache is None:
            return "Session(closed)"
        return f"Session({type(self.model).__name__}, {len(self._tokens)} tokens, {self.num_cached} of them cached)"

    # Turns

    def generate(self, turn: Turn = (), **generate_kwargs: Any) -> Any:
        """Add ``turn`` and the model's answer, running only what is new; without a turn, go on from the last token.

        Args:
            turn: the next tokens, or text.
            **generate_kwargs: as for ``model.generate()``, whose tokens, cache and masks the session brings.

        Returns: the tokens of the answer; with ``return_dict_in_generate`` what ``model.generate()`` returns.
        Raises:  ValueError, before anything changes, for what a session cannot do, be it by ``generate_kwargs`` or by
            the model's generation_config: several sequences, other decoding than token by token, inputs besides
            tokens. Whatever generate() raises, OutOfPagesError for one, with the session as it was: what had to be
            dropped for it is run again at the next turn.
        """
        self._open()
        tokens = torch.cat([self._tokens, self._ids_of(turn, is_first=len(self._tokens) == 0)])
        output = self._run(tokens, generate_kwargs)
        return self._tokens[len(tokens) :].tolist() if isinstance(output, torch.Tensor) else output

    def chat(self, content: str | None = None, **generate_kwargs: Any) -> str:
        """Say ``content`` as the user and return the model's answer, by the tokenizer's chat template.

        The template writes the whole conversation, ``messages``, anew; what its tokens have in common with those that
        were run stays, be it that the template drops earlier reasoning, or that ``messages`` were edited. What was said
        by ``generate`` is in no message, so the conversation would lose it: truncate it, or put it into ``messages``.

        Args:
            content: None answers the last of ``messages`` again.
            **generate_kwargs: as for ``generate``.

        Raises: as ``generate``, with ``messages`` as they were; ValueError where ``generate`` has said something since
            that is not in them.
        """
        self._open()
        if generate_kwargs.get("return_dict_in_generate"):
            raise ValueError("chat returns text: for return_dict_in_generate use generate()")
        said = [] if content is None else [{"role": "user", "content": content}]
        messages = [*self.messages, *said]
        if not messages or messages[-1]["role"] == "assistant":
            raise ValueError(
                "there is nothing to answer: give content, or take the answer to be given anew out of `messages`"
            )
        tokens = self._messages_ids(messages, add_generation_prompt=True)
        num_same, num_said = num_common(self._tokens, tokens), len(self._tokens)
        if num_same < num_said > self._num_chatted:
            raise ValueError(
                f"generate() has said {num_said - self._num_chatted} tokens that are not in `messages`, so that chat "
                f"would lose them: truncate({self._num_chatted}) takes them back; or put them into `messages`"
            )
        self._run(tokens, generate_kwargs)
        answer: str = self.tokenizer.decode(self._tokens[len(tokens) :].tolist(), skip_special_tokens=True)
        self._num_chatted = len(self._tokens)
        self._answer_ends = {index: end for index, end in self._answer_ends.items() if end <= num_same}
        self._answer_ends[len(messages)] = self._num_chatted
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def truncate(self, num_tokens: int) -> None:
        """Take back what was said from token ``num_tokens`` on, to say something else or to have it answered again.

        Of ``messages`` those stay whose text is whole in the tokens that are left; without a tokenizer, the answers.

        Raises: ValueError unless 0 <= num_tokens <= length.
        """
        self._open()
        if not 0 <= num_tokens <= len(self._tokens):
            raise ValueError(f"truncate to {num_tokens} tokens: the session has {len(self._tokens)}")
        if num_tokens < self._num_chatted:
            self.messages = self.messages[: self._num_messages_within(num_tokens)]
            self._answer_ends = {index: end for index, end in self._answer_ends.items() if end <= num_tokens}
            self._num_chatted = num_tokens
        self._tokens = self._tokens[:num_tokens]
        self._shorten(num_tokens)

    # Branches

    def fork(self, n: int = 1) -> list[Session]:
        """``n`` sessions that have said the same, and share its pages until one of them writes.

        Effects: copies less than a page a layer kind, or a head, for each.
        Raises:  ValueError for n < 1; OutOfPagesError, with none made.
        """
        self._open()
        if n < 1:
            raise ValueError(f"fork {n} sessions: give at least 1")
        made: list[Session] = []
        try:
            for _ in range(n):
                made.append(self._forked())
        except BaseException:
            for each in made:
                each.close()
            raise
        return made

    def prefix(self, turn: Turn | Sequence[dict[str, Any]]) -> Prefix:
        """Run ``turn``, for example a document, once: sessions of this model that begin with it get its pages.

        This session stays as it is. Sessions of another tenant do not find it, nor do turns under other adapters or
        autocast than now, for as long as these last. Once the model's weights have changed nobody does: release it.

        Args:
            turn: tokens, text, or messages, a system prompt's for one, as the tokenizer's chat template writes them.

        Returns: the handle that keeps it.
        Raises:  ValueError for no tokens, for more than a sliding window keeps, and where nothing can be shared (hooks,
            training mode, weights whose changes do not show); OutOfPagesError.
        """
        self._open()
        most = most_lendable(VTensorCache(config=self.model.config), 2**62)
        tokens = self._messages_ids(turn) if are_messages(turn) else self._ids_of(turn, is_first=True)
        if not 0 < len(tokens) <= most:
            rule = "give at least one" if len(tokens) == 0 else f"a sliding window keeps no more than {most}"
            raise ValueError(f"a prefix of {len(tokens)} tokens: {rule}")
        prefix_cache.check_keeps(self.model)
        neutral = copy.copy(self.model)  # of the module alone: its weights and layers are the model's
        neutral.generation_config = GenerationConfig(max_new_tokens=1, do_sample=False)
        with prefix_salt(self._salt), Session(self.model) as runner:
            runner._answer(neutral, tokens, {"generation_config": neutral.generation_config})
            return Prefix(len(tokens), prefix_cache.keep(self.model, runner._open(), tokens.tolist()))

    # On disk

    def save(self, path: str | Path) -> None:
        """Write tokens, messages, keys and values to a safetensors file, which is there whole or not at all.

        Effects: takes as much host memory as it writes, and reads all of the model's weights. Only what is written of
            the cache is saved. A file that is replaced leaves its mode; a link goes on to point to it.
        Raises:  OSError where the file cannot be written; TypeError for messages that json cannot tell.
        """
        cache = self._open()
        layers = {
            index: session_file.Rows(layer.keys, layer.values, layer.get_seq_length())
            for index, layer in enumerate(cache.layers)
            if layer.is_initialized and layer.get_seq_length() > 0
        }
        chat = session_file.Chat(self.messages, self._num_chatted, self._answer_ends)
        with in_use(cache):
            session_file.write(Path(path), self.model, self._tokens, chat, layers)

    @classmethod
    def load(cls, path: str | Path, model: Any, tokenizer: Any = None) -> Session:
        """The session that ``save`` wrote, bit for bit, in pages again.

        The model has to be the one that it was saved with: by the settings of its config, by sums over all bits of
        each weight, and by the adapters that are active. Not noticed are tables that are made anew with a model, as
        rotary frequencies are, where they were changed by hand; weights in tensor subclasses, as quantized ones are;
        code that changed; and in what precision it was run (autocast, attention).

        Effects: reads all of the model's weights.
        Raises:  ValueError for a file of something else, a damaged one, or one of another model, naming what differs;
            OutOfPagesError; FileNotFoundError.
        """
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise ValueError(f"no session is loaded for {type(model).__name__}, which is on several devices")
        session = cls(model, tokenizer)
        cache = session._open()
        try:
            with torch.no_grad(), session_file.read(Path(path), model, len(cache.layers)) as saved:
                session._tokens = known_tokens(saved.tokens, model)
                session.messages, session._num_chatted, session._answer_ends = saved.chat
                for index in saved.layers:
                    rows = saved.rows(index)
                    cache.update(rows.keys, rows.values, index)
                    if isinstance(cache.layers[index], DynamicSlidingWindowLayer):
                        cache.layers[index].cumulative_length = rows.num_tokens
        except BaseException:
            session.close()
            raise
        return session

    def close(self) -> None:
        """Give the memory back that no other session shares. Closing twice is fine."""
        self._cache = self._checkpoint = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Inside

    def _open(self) -> VTensorCache:
        if self._cache is None:
            raise ClosedError("this session is closed: make a new one, or fork before closing")
        return self._cache

    def _run(self, tokens: torch.Tensor, generate_kwargs: dict[str, Any]) -> Any:
        """Have the model answer ``tokens`` [T], of which the cache keeps what is the same, and take up both."""
        if len(tokens) == 0:
            raise ValueError("there is nothing to go on from: give the first turn at least one token")
        return self._answer(self.model, tokens, checked_settings(self.model, generate_kwargs))

    def _answer(self, model: Any, tokens: torch.Tensor, generate_kwargs: dict[str, Any]) -> Any:
        num_same = num_common(self._tokens, tokens)
        with prefix_salt(self._salt):
            self._shorten(min(num_same, len(tokens) - 1))  # one has to be run, for its logits
            if self.num_cached == 0:
                prefix_cache.begin(self.model, self._open(), tokens.tolist())
            num_kept = min(num_same, self.num_cached)
            try:
                self._checkpoint = checkpoint_of(self._open())
                ids = tokens.to(model.device)[None]
                with call_with(self._open()):
                    output = model.generate(
                        ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: self._cache}, **generate_kwargs
                    )
            except BaseException:
                self._shorten(num_kept)
                raise
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        self._tokens = sequences[0].cpu()
        # A loop that looks late whether to stop has run more; one that has run something else is not to be trusted.
        num_over = self.num_cached - len(self._tokens)
        is_one = all(layer.keys.shape[0] == 1 for layer in self._open().layers if layer.is_initialized)
        self._shorten(len(self._tokens) if num_over in ROWS_BEHIND and is_one else 0)
        return output

    def _num_messages_within(self, num_tokens: int) -> int:
        """How many of ``messages`` are told by the first so many tokens."""
        for index in reversed(range(len(self.messages))):
            if self._end_of(index) <= num_tokens:
                return index + 1
        return 0

    def _end_of(self, index: int) -> float:
        """Where in the tokens a message ends: of an answer, where the model did; of others, by the template."""
        if index in self._answer_ends:
            return self._answer_ends[index]
        if self.tokenizer is None:
            return float("inf")
        try:
            return len(self._messages_ids(self.messages[: index + 1]))
        except Exception:  # some templates refuse to write a beginning alone: it goes with what follows
            return float("inf")

    def _shorten(self, num_tokens: int) -> None:
        """Cut the cache to a beginning of its tokens, of at most so many."""
        cache = self._open()
        if cache.get_seq_length() > num_tokens and (
            num_tokens == 0 or not shorten(cache, num_tokens, self._checkpoint)
        ):
            self._cache, self._checkpoint = VTensorCache(config=self.model.config), None

    def _forked(self) -> Session:
        forked = object.__new__(type(self))
        vars(forked).update(vars(self))
        forked.messages = copy.deepcopy(self.messages)
        forked._answer_ends = dict(self._answer_ends)
        forked._cache = self._open().fork()
        return forked

    def _ids_of(self, turn: Any, *, is_first: bool) -> torch.Tensor:
        return tokens_of(turn, self.model, self.tokenizer, is_first=is_first)

    def _messages_ids(self, messages: Any, *, add_generation_prompt: bool = False) -> torch.Tensor:
        if self.tokenizer is None:
            raise ValueError("messages need a tokenizer with a chat template: Session(model, tokenizer)")
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        return known_tokens(torch.tensor(ids, dtype=torch.int64, device="cpu"), self.model)
