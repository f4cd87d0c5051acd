"""A model made on the device "meta" gets memory: on each rank for what a plan keeps there, module by module.

No rank ever holds more than one module whole besides its parts, so a model larger than one device can start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_vtensor.compile import _torch_compat, worlds
from torch_vtensor.compile.dataflow import find_dataflow
from torch_vtensor.compile.explanation import capture_call
from torch_vtensor.compile.parameters import find_layouts, keep_part
from torch_vtensor.compile.plan import record
from torch_vtensor.compile.plans import cuts_classes
from torch_vtensor.compile.plans.resolve import resolve
from torch_vtensor.compile.primitives import PlanFunction
from torch_vtensor.compile.sharded_tensor import Layout
from torch_vtensor.compile.topology import Topology


def reset_parameters(module: nn.Module) -> None:
    """Have a module of torch.nn draw its parameters anew.

    Raises:  ValueError for a module that cannot.
    """
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is None:
        raise ValueError(
            f"{type(module).__name__} has parameters or buffers of its own and no reset_parameters(). Pass "
            f"init=a function of one module that fills them, such as model._init_weights, or init=lambda module: None "
            f"and load a checkpoint."
        )
    reset()


def initialize(
    model: nn.Module,
    function: Callable[..., Any],
    *arguments: Any,
    plan: PlanFunction | str,
    mesh: Mapping[str, int] | None = None,
    init: Callable[[nn.Module], object] = reset_parameters,
    device: torch.device | str = "cpu",
    **keywords: Any,
) -> None:
    """Give a model that was made under ``torch.device("meta")`` memory for what a plan keeps on this rank, and fill it.

    Every rank has to call it, before the first call of the compiled function, with what that will be: the function
    (compiled or not), arguments of those sizes, on any device, and the same plan and mesh.

    init: called with each module that has parameters or buffers of its own, children first, while these are whole on
    the device; then only this rank's parts stay. It draws the same numbers on every rank, from a seed that rank 0
    draws. ``lambda module: None`` leaves memory as it is, for `load_state_dict` or torch.distributed.checkpoint to
    fill.

    Raises:  ValueError for a plan that cannot run, or a module that cannot be filled; RuntimeError for an `init` that
             changes another module's sharded parameters.
    """
    planned, on = resolve(plan, mesh, worlds.num_ranks())
    arguments, keywords = pytree.tree_map_only(Tensor, lambda value: value.to("meta"), (arguments, keywords))
    call = capture_call(function, arguments, keywords, cuts_classes=cuts_classes(planned))
    flow = find_dataflow(record(planned, call.captured.graph, on), Topology(), trains=True)
    examples = _torch_compat.leaves(list(call.arguments))
    layouts = dict(find_layouts(call.captured.arguments, examples, flow.storage, on.ranks, worlds.this_rank()))
    seed = worlds.from_rank_0(int(torch.randint(2**62, ())))
    where = torch.device(device)
    with torch.random.fork_rng([where] if where.type == "cuda" else []), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        if where.type == "cuda":
            with torch.cuda.device(where):
                torch.cuda.manual_seed(seed)
        model.apply(lambda module: _fill(module, layouts, init, where))


def _check_filled(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Raise where `init` has left a buffer alone that no checkpoint will fill either."""
    for name, buffer in buffers.items():
        if name in module._non_persistent_buffers_set and module._buffers[name] is buffer and not buffer._version:
            raise ValueError(
                f"{type(module).__name__}.{name} is in no checkpoint, and init left it as it was made, without values. "
                f"Pass an init that computes it, as the module's __init__ does."
            )


def _fill(
    module: nn.Module, layouts: Mapping[nn.Parameter, Layout], init: Callable[[nn.Module], object], device: torch.device
) -> None:
    """Give one module's own parameters and buffers memory; tied ones got theirs with the first module that has them."""
    parameters = {name: one for name, one in module._parameters.items() if one is not None and one.is_meta}
    buffers = {name: one for name, one in module._buffers.items() if one is not None and one.is_meta}
    if not parameters and not buffers:
        return
    try:
        for name, parameter in parameters.items():
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        made = {name: torch.empty_like(buffer, device=device) for name, buffer in buffers.items()}
        module._buffers.update(made)
        init(module)
        _check_filled(module, made)
        filled = {name: module._parameters[name] for name in parameters}
    except BaseException:
        module._buffers.update(buffers)
        raise
    finally:
        module._parameters.update(parameters)
    for name, parameter in parameters.items():
        whole = filled[name]
        assert whole is not None, f"init removed {name}"
        if parameter in layouts:
            keep_part(parameter, whole, layouts[parameter])
        else:
            _torch_compat.take_over(parameter, whole)
