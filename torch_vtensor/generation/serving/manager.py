"""The seam of continuous batching: transformers' manager with our loop in its thread.

    generate_batch() ─┐                                      add_request() ──> queue ─┐
    serve ────────────┼─> init_continuous_batching() ─> manager ─> thread ─> Engine <─┘
    your own code ────┘                                      get_result() <── router <┘

All that a caller sees of a manager is transformers' own code: queues, results, streaming, stopping. Only what its
thread runs is ours, and that it leaves the model's attention as it is.
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from torch_vtensor.generation.decode.program import Traced, traced_model
from torch_vtensor.generation.decode.support import windows_of
from torch_vtensor.generation.kv_store import capacity_of
from torch_vtensor.generation.serving._transformers_compat import (
    ContinuousBatchingManager,
    check_batching_config,
    default_batching_config,
    disable_missing_eos,
    drained,
    has_paused_itself,
    is_to_pause,
    mark_as_stopped,
    own_processors,
    request_stop,
    wait_while_paused,
    wake_up_event,
)
from torch_vtensor.generation.serving.choice import Choice, choice_of
from torch_vtensor.generation.serving.engine import MAX_BATCH, Engine, Terms
from torch_vtensor.generation.serving.known import Reuse
from torch_vtensor.generation.serving.prompts import PromptShape, shapes_alone, shapes_up_to
from torch_vtensor.generation.serving.rows import RowsLayout
from torch_vtensor.generation.serving.step_graphs import size_of
from torch_vtensor.generation.serving.steps import Pace
from torch_vtensor.generation.serving.support import counters, log, why_never, why_stock
from torch_vtensor.generation.tenant import current_salt

__all__ = ["BatchingManager", "init_batching"]

_IDLE_S = 0.1
_KEPT = "_cached_continuous_batching_manager"
"""Where transformers notes the manager that a model keeps for its next session."""


def init_batching(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """``init_continuous_batching``: a manager over memory that grows in place, or transformers' own, with the reason.

    The caller says by ``configure`` what the manager is to do.
    """
    if isinstance(getattr(model, _KEPT, None), BatchingManager):
        manager = stock(model, *args, **kwargs)  # which finds it
    else:
        manager = _manager_of(model, inspect.signature(stock).bind(model, *args, **kwargs).arguments)
    if isinstance(manager, str):
        counters[f"stock: {manager}"] += 1
        log.info("transformers' own manager batches for %s: %s", type(model).__name__, manager)
        return stock(model, *args, **kwargs)
    counters["managers"] += 1
    return manager


def _manager_of(model: Any, given: dict[str, Any]) -> BatchingManager | str:
    """Our manager for what is given to ``init_continuous_batching``, or why it is to be transformers'."""
    if getattr(model, _KEPT, None) is not None:
        return "transformers' own manager was kept from before"
    if (reason := why_never(model)) is not None:
        return reason
    config = given.get("generation_config") or model.generation_config
    batching = given.get("continuous_batching_config") or default_batching_config(config)
    if (reason := why_stock(model, batching)) is not None:
        return reason
    check_batching_config(batching)
    disable_missing_eos(config)
    model.eval()  # as transformers does
    try:
        with torch.inference_mode(False), torch.no_grad():
            traced = traced_model(model)
    except Exception as error:  # whatever the model's own code may raise
        log.debug("why %s cannot be served", type(model).__name__, exc_info=error)
        return "the model's step cannot be run over rows at addresses"
    manager = BatchingManager(model, config, batching, given.get("workload_hints"))
    choice = choice_of(own_processors(manager), bool(getattr(config, "do_sample", True)), model.device)
    if isinstance(choice, str):
        return choice
    manager.serve_by(traced, choice, batching, given.get("workload_hints"))
    return manager


class _SaltedQueue(queue.Queue[Any]):
    """Notes whose requests are put into it."""

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        item.torch_vtensor_salt = current_salt()
        super().put(item, *args, **kwargs)


class BatchingManager(ContinuousBatchingManager):
    """transformers' ``ContinuousBatchingManager`` whose requests lie in memory that grows in place."""

    is_captured = False
    """Whether steps are compiled and captured."""
    _engine: Engine | None = None

    def serve_by(self, traced: Traced, choice: Choice, batching: Any, hints: Any) -> None:
        """Have requests served by these steps.

        Args:
            batching: the continuous batching configuration as it was given.
            hints: transformers' ``WorkloadHints`` of the requests that will come, if they are known.
        """
        self.input_queue: queue.Queue[Any] = _SaltedQueue(maxsize=batching.max_queue_size)
        self._traced, self._choice, self._given, self._hints = traced, choice, batching, hints
        self._reuse = Reuse()
        self._warmups: queue.Queue[threading.Event] = queue.Queue()

    def configure(self, is_captured: bool, reuses_prefixes: bool) -> None:
        """Say whether steps are compiled and captured, and prefixes reused, as far as the manager's own settings allow.

        Effects: an engine that runs goes on capturing or not.
        """
        graphs = self._given.use_cuda_graph
        wanted = {graphs} if isinstance(graphs, bool) or graphs is None else set(graphs)
        if True in wanted and not is_captured:
            counters["not honoured: use_cuda_graph, without enable(compile=True)"] += 1
        self.is_captured = is_captured and False not in wanted
        if (self._given.max_requests_per_batch or 0) > MAX_BATCH:
            counters[f"limited: max_requests_per_batch is more than {MAX_BATCH}"] += 1
        self._reuse.switch(reuses_prefixes and self._given.allow_block_sharing)

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Leave the model's attention as it is, where transformers would have it read a paged cache."""

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Have everything compiled and captured, which is done when it is first needed otherwise.

        The manager's own thread does it, before the first request if it is not started yet. What is made is kept with
        the model for later managers. A manager of ``generate_batch()`` knows how long its prompts are and how many, and
        makes only what they surely need.

        Effects: waits until it is done, if the manager is running.
        """
        self.warmed_up = True
        if not self.is_captured:
            return
        done = threading.Event()
        self._warmups.put(done)
        wake_up_event(self).set()
        thread = self._generation_thread
        while thread is not None and thread is not threading.current_thread() and thread.is_alive():
            if done.wait(_IDLE_S):
                break

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """As transformers' own, which collects garbage in the end: what took 0.2 seconds, and found none of ours."""
        if keep_for_next_session or not self.is_running() or has_paused_itself(self):
            super().stop(block, timeout, keep_for_next_session, hard_stop)
            return
        began = time.perf_counter()
        request_stop(self, hard_stop)
        if block:
            self.join(began, timeout)
        self.batch_processor: Engine | None = None

    def join(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' own, for a loop that is told."""
        wake_up_event(self).set()
        super().join(*args, **kwargs)

    def forget(self) -> None:
        """Do not be found for later sessions; one that is running goes on to its end."""
        if vars(self.model).get(_KEPT) is self:
            delattr(self.model, _KEPT)

    def keep_no_prefixes(self) -> None:
        """From now on begin with nothing that is known, and leave nothing."""
        self._reuse.switch(False)

    def _run_generation_loop(self, use_inference_mode: bool = False) -> None:
        # What 5.24 hands on from the caller's thread is not for these steps: what they make outlives them.
        try:
            if self.model.device.type == "cuda":
                torch.cuda.set_device(self.model.device)
            with torch.inference_mode(False), torch.no_grad():
                self._engine = self.batch_processor = self._make_engine()
                while self._serve(self._engine):
                    pass
                error = RuntimeError("the manager was stopped before this request was answered")
                self._fail_all_remaining_requests(error, self._engine)
        except Exception as error:
            log.exception("continuous batching of %s has failed", type(self.model).__name__)
            self._handle_critical_error(error, self._engine)
        finally:
            try:
                if self._engine is not None:
                    self._engine.close()
            finally:
                self._engine = None
                mark_as_stopped(self)

    def _serve(self, engine: Engine) -> bool:
        """Whether to go on after a round of what there is to do."""
        status = self.background_thread_status
        status.update_with_tp_status(status.local_status)
        if status.tp_status >= status.HARD_STOP:
            return False
        if is_to_pause(self):
            self._pause(engine)
            return True
        for done in drained(self._warmups):
            engine.warm_up(self._to_be_captured())
            done.set()
        for state in drained(self.input_queue):
            try:
                self.logit_processor.check_kwargs(state.logit_processor_kwargs)
                engine.add(state, state.torch_vtensor_salt)
            except Exception as error:
                self.output_router.fail_and_deliver(state, error)
        for request_id in drained(self.cancel_queue):
            engine.cancel(request_id)
        if engine.has_pending_requests():
            if engine.round():
                return True
            if not threading.main_thread().is_alive():
                return False  # nobody will wake the memory, or free any
        elif status.tp_status >= status.FLUSH_AND_STOP:
            return False
        wake_up = wake_up_event(self)
        wake_up.wait(timeout=_IDLE_S)
        wake_up.clear()
        return True

    def _pause(self, engine: Engine) -> None:
        """Let others use the model, which may come back with other weights."""
        engine.settle()
        wait_while_paused(self)
        if not self._traced.is_of_today():  # graphs would read memory that is not the weights' any more
            other = self._make_engine(engine.seed)
            try:
                engine.hand_over(other)
            except BaseException:
                other.close()  # whoever waits for an answer is the old one's still
                raise
            self._engine = self.batch_processor = other
            engine.close()

    def _make_engine(self, seed: int | None = None) -> Engine:
        """An engine for the model as it is.

        Args:
            seed: default: the configuration's, or one that is drawn by torch's own generator.
        """
        model, traced = self.model, self._traced
        if not traced.is_of_today():
            traced = self._traced = traced_model(model)
        windows = windows_of(model)
        assert windows is not None
        most = getattr(model.config, "max_position_embeddings", None) or 1
        layout = RowsLayout(traced.shapes, windows, model.device, capacity_of(most, model.device))
        if seed is None:
            seed = self.continuous_batching_config.seed
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        terms = Terms(
            self._choice,
            seed,
            self._max_batch,
            self.is_captured,
            self._reuse,
            Pace(
                self._given.max_batch_tokens,
                prompts_first=self._given.scheduler_type == "prefill_first",
                all_together=self._hints is not None,
            ),
            self._given.safety_margin,
        )
        return Engine(model, traced, layout, terms, self.output_router)

    @property
    def _max_batch(self) -> int:
        return min(self.continuous_batching_config.max_requests_per_batch or MAX_BATCH, MAX_BATCH)

    def _to_be_captured(self) -> list[PromptShape | int]:
        """What ``warmup`` is for: all shapes and sizes, or those that the hints for a session surely need."""
        hints = self._hints
        if hints is None:
            sizes = [1 << index for index in range(self._max_batch.bit_length())]
            most = getattr(self.model.config, "max_position_embeddings", None) or 1
            return [*shapes_up_to(most, self._max_batch), *sizes, *{size_of(self._max_batch)} - {*sizes}]
        return [*shapes_alone(hints.max_prompt_length), size_of(min(hints.num_requests, self._max_batch))]
