"""What of transformers' continuous batching is private or differs by version. Checked on 5.17 and 5.23.

Before, managers talk to their loop in other ways (4.57.6, 5.0, 5.10 and 5.13 were looked at): those stay stock.
"""

from __future__ import annotations

import importlib
import queue
from typing import Any

from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestStatus

__all__ = [
    "ContinuousBatchingManager",
    "RequestStatus",
    "check_batching_config",
    "default_batching_config",
    "disable_missing_eos",
    "drained",
    "has_paused_itself",
    "is_to_pause",
    "mark_as_stopped",
    "own_processors",
    "per_request_processors",
    "request_stop",
    "run_server",
    "wait_while_paused",
    "wake_up_event",
    "why_no_server",
    "why_other_interface",
]


def why_other_interface() -> str | None:
    """Why this version's managers cannot be given another loop, or None."""
    status, router = (getattr(continuous_api, name, None) for name in ("BackgroundThreadStatus", "OutputRouter"))
    if not hasattr(status, "update_with_tp_status") or not hasattr(router, "fail_and_deliver"):
        return "this version of transformers batches by another interface"
    return None


def default_batching_config(generation_config: Any) -> Any:
    """The continuous batching configuration of who gives none."""
    from transformers import ContinuousBatchingConfig

    given = getattr(generation_config, "continuous_batching_config", None)
    return given if isinstance(given, ContinuousBatchingConfig) else ContinuousBatchingConfig()


def check_batching_config(config: Any) -> None:
    """Raise ValueError for what transformers' own scheduler would refuse."""
    margin = config.safety_margin
    if margin is not None and not 0 <= margin <= 1:
        raise ValueError(f"safety_margin is {margin}; it is a part of the memory, from 0 to 1")
    if config.max_requests_per_batch is not None and config.max_requests_per_batch < 1:
        raise ValueError(f"max_requests_per_batch is {config.max_requests_per_batch}; it is at least 1")


def disable_missing_eos(generation_config: Any) -> None:
    """As ``init_continuous_batching`` does: without one here, no token ends an answer, whatever the model's says."""
    if generation_config.eos_token_id is None:
        continuous_api.logger.warning("`eos_token_id` not set in GenerationConfig. Setting to -1 (disabled).")
        generation_config.eos_token_id = -1


def per_request_processors() -> tuple[type, ...]:
    """The classes of logits processors that look at numbers of each request's own."""
    from transformers.generation.continuous_batching import cb_logits_processors

    return (cb_logits_processors.ContinuousBatchingLogitsProcessor,)


def own_processors(manager: Any) -> list[Any]:
    """The logits processors that a manager has found to be for continuous batching."""
    return list(manager.logit_processor.logits_processor)


def drained(waiting: queue.Queue[Any]) -> list[Any]:
    """Everything that was in a queue."""
    found = []
    try:
        while True:
            found.append(waiting.get_nowait())
    except queue.Empty:
        return found


def wake_up_event(manager: Any) -> Any:
    """What is set when there is something new for the loop."""
    return getattr(manager, "_wake_up_loop", None) or manager._has_new_requests


def is_to_pause(manager: Any) -> bool:
    """Whether somebody wants to use the model alone."""
    status = manager.background_thread_status
    return hasattr(status, "is_pause_requested") and bool(status.is_pause_requested())


def has_paused_itself(manager: Any) -> bool:
    """Whether this thread has the model alone, for as long as which the loop cannot end."""
    return is_to_pause(manager) and bool(manager.background_thread_status.is_pause_requested(local=True))


def request_stop(manager: Any, is_hard: bool) -> None:
    """Have the loop end: at once, or when all requests are answered."""
    status = manager.background_thread_status
    wanted = status.HARD_STOP if is_hard else status.FLUSH_AND_STOP
    status.request_stop(wanted, manager.distributed_helper.global_rank)


def wait_while_paused(manager: Any) -> None:
    """Let those who asked for it use the model."""
    manager.background_thread_status.pause_and_wait()


def mark_as_stopped(manager: Any) -> None:
    """Note that the loop has ended."""
    manager.background_thread_status.mark_as_stopped()


def why_no_server() -> str | None:
    """What `transformers serve` lacks to run with our loop, and what to do about it; None if nothing."""
    if (reason := why_other_interface()) is not None:
        return f"{reason}: install transformers 5.17 or later"
    from transformers.utils.import_utils import is_serve_available

    try:
        importlib.import_module("transformers.cli.transformers")
    except ImportError as error:
        return f"{error}: pip install 'torch-vtensor[serving]'"
    return None if is_serve_available() else "packages are missing: pip install 'torch-vtensor[serving]'"


def run_server(arguments: list[str]) -> None:
    """``transformers serve`` with these arguments, until it is interrupted."""
    from transformers.cli.transformers import app

    try:
        app(["serve", *arguments], standalone_mode=False)
    except KeyboardInterrupt:
        pass
    except Exception as error:
        if type(error).__name__ != "Abort":  # click's, or that of the copy of it which typer brings
            raise
