"""What one rank holds on to while it runs its actions."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ready_models import captured, llama
from torch import Tensor
from virtual import run_plan

from torch_vtensor.compile import Mesh, virtual_world
from torch_vtensor.compile.executor import _Sums
from torch_vtensor.compile.plans import named


def test_messages_that_have_arrived_keep_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = captured(llama, False)
    send, wait = virtual_world.Mailboxes.send, virtual_world._Part.wait
    under_way: dict[int, set[str]] = {0: set(), 1: set()}
    most = {0: 0, 1: 0}

    def sent(self: Any, name: str, step: Any, tensor: Tensor) -> Any:
        rank = step.source.rank
        under_way[rank].add(name)
        most[rank] = max(most[rank], len(under_way[rank]))
        return send(self, name, step, tensor)

    def settled(self: Any) -> Sequence[Tensor]:
        under_way[self._rank].discard(self._box.name)
        return wait(self)

    monkeypatch.setattr(virtual_world.Mailboxes, "send", sent)
    monkeypatch.setattr(virtual_world._Part, "wait", settled)
    plan = named("1f1b/4", 2)
    compilation, _ = run_plan(call, plan, Mesh((0, 1), plan.axes))
    num_sent = [sum(action.kind == "SEND" for action in compilation.schedule.actions[rank]) for rank in (0, 1)]
    assert min(num_sent) >= 4
    assert max(most.values()) <= 2
    assert not any(under_way.values())


def test_gradients_of_a_pass_are_added_up_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = captured(llama, False)
    sizes: list[int] = []
    add = torch._foreach_add_

    def counted(totals: list[Tensor], addends: list[Tensor]) -> None:
        sizes.append(len(totals))
        add(totals, addends)

    monkeypatch.setattr(torch, "_foreach_add_", counted)
    compilation, _ = run_plan(call, named("accumulate4", 1), Mesh((0,)))
    parameters = sum(tensor.kind == "parameter" for tensor in compilation.captured.graph.inputs)
    assert sizes == [parameters] * 2  # the first two microbatches' are added up in new memory


def test_a_sum_that_takes_part_in_another_is_finished_first() -> None:
    one, two, three = (torch.full((3,), float(value)) for value in (1, 2, 4))
    sums = _Sums()
    total = sums.of([one, two], in_place=True)
    assert total is one
    assert sums.of([total, three], in_place=True) is one
    whole = sums.of([two, total], in_place=False)
    assert whole.tolist() == [9.0] * 3
    assert sums.of([three, whole], in_place=True) is three
    assert three.tolist() == [4.0] * 3, "not yet"
    sums.finish()
    assert three.tolist() == [13.0] * 3
