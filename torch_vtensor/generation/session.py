"""Session: a conversation with a model that runs only new tokens, branches by sharing pages, and can be put on disk.

    tokens   [ system, question, answer, question, answer ]      what was said: a session is these
    cache    [ rows ========================= ]                  of a beginning of them, all but the last as a rule

Whatever happens in between, the cache holds the rows of a beginning of the tokens: what is taken back or has failed is
cut off, and the next turn runs what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from torch_vtensor.allocator.prefix import Pin
from torch_vtensor.errors import ClosedError
from torch_vtensor.generation import prefix_cache, session_file
from torch_vtensor.generation._transformers_compat import CACHE_NAME, DynamicSlidingWindowLayer, GenerationMixin
from torch_vtensor.generation.cache import CacheMemory, VTensorCache
from torch_vtensor.generation.cached_rows import ROWS_BEHIND, Checkpoint, checkpoint_of, most_lendable, shorten
from torch_vtensor.generation.enable import keeps_prefixes
from torch_vtensor.generation.report import why_all_stock
from torch_vtensor.generation.tenant import current_salt, prefix_salt

__all__ = ["Prefix", "Session"]

Turn = str | Sequence[int] | torch.Tensor
"""Text, for which the session needs a tokenizer; or token ids: a list, or a tensor [T] or [1, T]."""

_ITS_OWN = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache",
            "use_cache", "cache_implementation"}  # fmt: skip


class Prefix:
    """Tokens that were run once and whose pages sessions of the model begin with, until ``release`` or a block's end.

    Sessions that have begun with them keep them for themselves.
    """

    def __init__(self, num_tokens: int, pin: Pin) -> None:
        self.num_tokens = num_tokens
        self._pin = pin

    def release(self) -> None:
        """Let the memory go as soon as no session uses it. Releasing twice is fine."""
        self._pin.release()
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
        Raises:  ValueError for what a session cannot do; whatever generate() raises, OutOfPagesError for one, with the
            session as it was: what had to be dropped for it is run again at the next turn.
        """
        self._open()
        tokens = torch.cat([self._tokens, self._ids_of(turn, is_first=len(self._tokens) == 0)])
        output = self._run(tokens, generate_kwargs)
        return self._tokens[len(tokens) :].tolist() if isinstance(output, torch.Tensor) else output

    def chat(self, content: str | None = None, **generate_kwargs: Any) -> str:
        """Say ``content`` as the user and return the model's answer, by the tokenizer's chat template.

        The template writes the whole conversation, ``messages``, anew; what its tokens have in common with those that
        were run stays, be it that the template drops earlier reasoning, or that ``messages`` were edited.

        Args:
            content: None answers the last of ``messages`` again.
            **generate_kwargs: as for ``generate``.

        Raises: as ``generate``, with ``messages`` as they were.
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
        self._run(tokens, generate_kwargs)
        answer: str = self.tokenizer.decode(self._tokens[len(tokens) :].tolist(), skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def truncate(self, num_tokens: int) -> None:
        """Take back what was said from token ``num_tokens`` on, to say something else or to have it answered again.

        Raises: ValueError unless 0 <= num_tokens <= length.
        """
        self._open()
        if not 0 <= num_tokens <= len(self._tokens):
            raise ValueError(f"truncate to {num_tokens} tokens: the session has {len(self._tokens)}")
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

        This session stays as it is. Sessions of another tenant do not find it, nor does one of a model that changed.

        Args:
            turn: tokens, text, or messages, a system prompt's for one, as the tokenizer's chat template writes them.

        Returns: the handle that keeps it.
        Raises:  ValueError for no tokens, for more than a sliding window keeps, and where nothing can be shared (hooks,
            training mode, weights whose changes do not show); OutOfPagesError.
        """
        self._open()
        most = most_lendable(VTensorCache(config=self.model.config), 2**62)
        tokens = self._messages_ids(turn) if _are_messages(turn) else self._ids_of(turn, is_first=True)
        if not 0 < len(tokens) <= most:
            rule = "give at least one" if len(tokens) == 0 else f"a sliding window keeps no more than {most}"
            raise ValueError(f"a prefix of {len(tokens)} tokens: {rule}")
        with prefix_salt(self._salt), Session(self.model) as runner:
            runner._run(tokens, {"max_new_tokens": 1, "do_sample": False})
            return Prefix(len(tokens), prefix_cache.keep(self.model, runner._open(), tokens.tolist()))

    # On disk

    def save(self, path: str | Path) -> None:
        """Write tokens, messages, keys and values to a safetensors file, which is there whole or not at all.

        Effects: takes as much host memory as it writes. Only what is written of the cache is saved.
        Raises:  OSError where the file cannot be written.
        """
        cache = self._open()
        layers = {
            index: session_file.Rows(layer.keys, layer.values, layer.get_seq_length())
            for index, layer in enumerate(cache.layers)
            if layer.is_initialized and layer.get_seq_length() > 0
        }
        session_file.write(Path(path), self.model, self._tokens, self.messages, layers)

    @classmethod
    def load(cls, path: str | Path, model: Any, tokenizer: Any = None) -> Session:
        """The session that ``save`` wrote, bit for bit, in pages again.

        Raises: ValueError for a file of something else, or of a model with other weights, sizes or dtype, naming what
            differs; OutOfPagesError; FileNotFoundError.
        """
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise ValueError(f"no session is loaded for {type(model).__name__}, which is on several devices")
        session = cls(model, tokenizer)
        cache = session._open()
        try:
            with torch.no_grad(), session_file.read(Path(path), model, len(cache.layers)) as saved:
                session._tokens, session.messages = saved.tokens, saved.messages
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
        self._check(tokens, generate_kwargs)
        num_common = _num_common(self._tokens, tokens)
        with prefix_salt(self._salt):
            self._shorten(min(num_common, len(tokens) - 1))  # one has to be run, for its logits
            if self.num_cached == 0:
                prefix_cache.begin(self.model, self._open(), tokens.tolist())
            num_kept = min(num_common, self.num_cached)
            try:
                self._checkpoint = checkpoint_of(self._open())
                ids = tokens.to(self.model.device)[None]
                output = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: self._cache}, **generate_kwargs
                )
            except BaseException:
                self._shorten(num_kept)
                raise
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        self._tokens = sequences[0].cpu()
        # A loop that looks late whether to stop has run more; one that has run something else is not to be trusted.
        num_over = self.num_cached - len(self._tokens)
        self._shorten(len(self._tokens) if num_over in ROWS_BEHIND else 0)
        return output

    def _check(self, tokens: torch.Tensor, generate_kwargs: dict[str, Any]) -> None:
        if len(tokens) == 0:
            raise ValueError("there is nothing to go on from: give the first turn at least one token")
        if taken := sorted(_ITS_OWN & generate_kwargs.keys()):
            raise ValueError(f"generate got {', '.join(taken)}, which a session brings itself: leave it out")
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            count = generate_kwargs.get(name, getattr(config, name, None)) or 1
            if count > 1:
                raise ValueError(f"{name} is {count}; a session is one sequence: fork({count}) makes several of it")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if generate_kwargs.get(name, getattr(config, name, None)) is not None:
                raise ValueError(
                    f"assisted generation, by {name}, runs again what a cache holds, in transformers: leave it out"
                )

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
        forked.messages = list(self.messages)
        forked._cache = self._open().fork()
        return forked

    def _ids_of(self, turn: Any, *, is_first: bool) -> torch.Tensor:
        if isinstance(turn, str):
            if self.tokenizer is None:
                raise ValueError("the turn is text, for which a session needs a tokenizer: Session(model, tokenizer)")
            turn = self.tokenizer(turn, add_special_tokens=is_first)["input_ids"]
        ids = turn if isinstance(turn, torch.Tensor) else torch.tensor(list(turn), dtype=torch.int64, device="cpu")
        if ids.dim() == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"a turn is tokens [T] or [1, T], of one sequence; it is {tuple(ids.shape)} {ids.dtype}")
        return self._checked(ids.to("cpu", torch.int64))

    def _messages_ids(self, messages: Any, *, add_generation_prompt: bool = False) -> torch.Tensor:
        if self.tokenizer is None:
            raise ValueError("messages need a tokenizer with a chat template: Session(model, tokenizer)")
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        return self._checked(torch.tensor(ids, dtype=torch.int64, device="cpu"))

    def _checked(self, ids: torch.Tensor) -> torch.Tensor:
        """Refuse tokens that the model does not know: a GPU's kernel would not survive them."""
        num_known = self.model.get_input_embeddings().num_embeddings
        wrong = ids[(ids < 0) | (ids >= num_known)]
        if len(wrong):
            raise ValueError(f"token {int(wrong[0])} is none of the model's, which go from 0 to {num_known - 1}")
        return ids


def _are_messages(turn: Any) -> bool:
    return not isinstance(turn, str | torch.Tensor) and len(turn) > 0 and isinstance(turn[0], dict)


def _num_common(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0]) if len(differ) else length
