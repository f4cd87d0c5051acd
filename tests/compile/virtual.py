"""All ranks of a plan in this process: what they compute, next to what one process computes without a plan."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_vtensor.compile import explanation
from torch_vtensor.compile.backend import Compilation, compile_plan
from torch_vtensor.compile.codegen import CodeGenerator
from torch_vtensor.compile.mesh import Mesh
from torch_vtensor.compile.parameters import part_of
from torch_vtensor.compile.primitives import PlanFunction
from torch_vtensor.compile.virtual_world import run_all

Captures = explanation.CapturedCall


def capture_call(function: Callable[..., Any], *arguments: Any, cuts_classes: bool = False) -> Captures:
    """Capture a function at a call, without compiling it."""
    return explanation.capture_call(function, arguments, cuts_classes=cuts_classes)


def run_plan(
    call: Captures, plan: PlanFunction, mesh: Mesh, codegen: str = "eager"
) -> tuple[Compilation, Mapping[int, dict[str, Any]]]:
    """Plan, check and run a captured call on every rank, with gradients; returns every rank's values at the end."""
    compilation = compile_plan(call.captured, plan, mesh, trains=True)
    program = compilation.program
    given = {tensor: value for tensor, value in zip(call.captured.arguments, call.arguments, strict=True) if tensor}
    given.update(call.captured.constants)
    values: dict[int, dict[str, Any]] = {rank: {} for rank in mesh.ranks}
    for (rank, key), view in program.arguments.items():
        values[rank][key] = part_of(given[view.tensor].detach(), view.mask)
    for (rank, key), tensor in program.seeds.items():
        values[rank][key] = torch.ones(tensor.shape, dtype=tensor.dtype)
    run_all(program, compilation.schedule, values, CodeGenerator(codegen, {}), torch.device("cpu"))
    return compilation, values


def assert_plan_is_right(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    arguments: Sequence[Tensor],
    plan: PlanFunction,
    mesh: Mesh,
    tolerance: float = 1e-9,
    call: Captures | None = None,
    codegen: str = "eager",
) -> Compilation:
    """The loss and every gradient, on every rank that has them, are those of one process.

    `call` is the captured call, where a test has it already.
    """
    call = call or capture_call(loss_of, *arguments)
    compilation, values = run_plan(call, plan, mesh, codegen)
    model.zero_grad()
    loss = loss_of(*arguments)
    loss.backward()
    # A tied parameter may be captured under any of its names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for (rank, tensor), key in compilation.program.outputs.items():
        if tensor in compilation.captured.graph.outputs:
            torch.testing.assert_close(values[rank][key], loss.detach(), rtol=tolerance, atol=tolerance)
    got = set()
    for (rank, tensor), (key, mask) in compilation.program.gradients.items():
        if tensor.kind == "parameter":
            wanted = part_of(parameters[tensor.name].grad, mask)
            got.add(parameters[tensor.name])
            torch.testing.assert_close(
                values[rank][key],
                wanted,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=tensor.name, rank=rank: f"gradient of {name} on rank {rank}: {text}",
            )
    assert got == {parameter for parameter in parameters.values() if parameter.grad is not None}
    return compilation
