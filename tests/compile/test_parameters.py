"""Parameters sharded in place: on two ranks, next to one process; and one rank's part of them, by itself."""

import copy
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sharded_world
import torch
import torch.distributed.checkpoint as dcp
from forked_ranks import environment
from sharded_world import Tiny, Trained, adamw, batches, train
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

import torch_vtensor.compile as ss
from torch_vtensor.compile.parameters import shard_parameters
from torch_vtensor.compile.sharded_tensor import Layout
from torch_vtensor.compile.tensor_view import Interval, LogicalTensor, Mask

PLANS = ("tensor_parallel", "one_f_one_b", "zero")
pytestmark = pytest.mark.xdist_group("processes")  # two worlds at once would share two cores


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has to say."""
    path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, sharded_world.__file__, str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(path / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> Trained:
    """What one process makes of the same, without a plan."""
    model, trained = Tiny(), Trained()
    optimizer = adamw(model)
    trained.steps += train(model, model, optimizer, batches(), nn.utils.clip_grad_norm_)
    with torch.no_grad():
        trained.evaluation = model(batches()[0]).item()
    trained.model, trained.optimizer = model.state_dict(), optimizer.state_dict()
    return trained


@pytest.mark.parametrize("plan", PLANS)
def test_training_is_that_of_one_process(plan: str, ranks: list[dict[str, Any]], alone: Trained) -> None:
    for results in ranks:
        trained = Trained(**results[plan])
        torch.testing.assert_close(trained.steps, alone.steps)
        torch.testing.assert_close(trained.evaluation, alone.evaluation)
        torch.testing.assert_close(trained.model, dict(alone.model))
        torch.testing.assert_close(trained.optimizer["state"], alone.optimizer["state"])
        assert trained.num_compilations == 2, "one for each size of the batch"


def expected_parts(plan: str, rank: int) -> dict[str, int]:
    """Elements that a rank should keep of each parameter: 17 hidden rows are 9 and 8, and 8 or 12 rows are halves."""
    kept = {}
    for name, parameter in Tiny().named_parameters():
        has_hidden_rows = name.endswith(("1.weight", "1.bias"))
        if plan == "one_f_one_b":
            kept[name] = parameter.numel() if name.startswith(("embed", f"blocks.{rank}")) else 0
        elif has_hidden_rows or (plan == "tensor_parallel" and name.endswith("3.weight")):
            kept[name] = parameter.numel() * (9, 8)[rank] // 17
        else:
            kept[name] = parameter.numel() // (2 if plan == "zero" else 1)
    return kept


@pytest.mark.parametrize("plan", PLANS)
def test_each_rank_keeps_its_part_of_parameters_gradients_and_state(plan: str, ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        trained = Trained(**results[plan])
        assert trained.kept == expected_parts(plan, rank)
        assert trained.gradient_elements == trained.kept
        assert trained.state_elements == trained.kept


def test_what_one_plan_saves_others_load(ranks: list[dict[str, Any]], alone: Trained) -> None:
    for results in ranks:
        torch.testing.assert_close(results["loaded"]["model"], dict(alone.model))
        torch.testing.assert_close(results["loaded"]["optimizer"]["state"], alone.optimizer["state"])


def test_a_model_without_a_plan_loads_what_a_plan_saved(ranks: list[dict[str, Any]], alone: Trained) -> None:
    model = Tiny()
    optimizer = adamw(model)
    file = io.BytesIO()
    torch.save(ranks[0]["checkpoint"], file)
    file.seek(0)
    checkpoint = torch.load(file)
    ss.load_state_dict(model, checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    left = batches()[sharded_world.STEPS_BEFORE_CHECKPOINT :]
    steps = list(train(model, model, optimizer, left, nn.utils.clip_grad_norm_))
    torch.testing.assert_close(steps, alone.steps[-len(left) :])
    torch.testing.assert_close(dict(model.state_dict()), dict(alone.model))


def test_what_ranks_save_in_parts_others_load(ranks: list[dict[str, Any]], alone: Trained) -> None:
    for results in ranks:
        torch.testing.assert_close(results["loaded_parts"]["model"], dict(alone.model))
        torch.testing.assert_close(results["loaded_parts"]["optimizer"]["state"], alone.optimizer["state"])
        sizes = results["part_bytes"]
        assert len(sizes) == 2
        assert max(sizes) < 0.7 * sum(sizes)


def test_a_step_that_one_rank_cannot_take_no_rank_takes(ranks: list[dict[str, Any]]) -> None:
    model = Tiny()
    expected = sharded_world.train_scaled(model, model, breaks=True)
    assert expected["scale"] == 8.0, "halved once, doubled after two good steps"
    for results in ranks:
        assert results["scaled"]["scale"] == expected["scale"]
        torch.testing.assert_close(results["scaled"]["model"], dict(expected["model"]))


def test_one_rank_alone_may_ask_for_a_checkpoint(ranks: list[dict[str, Any]]) -> None:
    assert [results["num_on_rank_1"] for results in ranks] == [0, len(Tiny().state_dict())]


# ---------------------------------------------------------------- one rank's part

PART = Mask((Interval(2, 5), Interval(0, 4)))


def shard(*parameters: nn.Parameter, parts: Mapping[int, Mask] | None = None) -> None:
    """Have this process, as rank 0 of two, keep rows 2 to 5 of parameters of shape [6, 4]."""
    tensors = [LogicalTensor(f"weight{i}", tuple(p.shape), p.dtype, "parameter") for i, p in enumerate(parameters)]
    storage = dict.fromkeys(tensors, parts or {0: PART, 1: Mask.of((6, 4))})
    shard_parameters(tensors, parameters, storage, (0, 1), 0)


def weight() -> nn.Parameter:
    return nn.Parameter(torch.arange(24.0).reshape(6, 4) / 24)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, centered=True),
}


@pytest.mark.parametrize("steps_before", [0, 1], ids=["fresh", "stepped"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_update_the_part_as_they_would_the_whole(make: Any, steps_before: int) -> None:
    sharded, expected, untouched = weight(), weight(), nn.Parameter(torch.ones(3))
    optimizer, reference = make([sharded, untouched]), make([expected])

    def step(gradient: torch.Tensor) -> None:
        expected.grad = gradient
        untouched.grad = torch.ones(3)
        is_sharded = isinstance(sharded, ss.ShardedTensor)
        part = gradient[2:5].clone() if is_sharded else gradient
        sharded.grad = ss.ShardedTensor.of(part, sharded.keeps) if is_sharded else part
        optimizer.step()
        reference.step()

    for _ in range(steps_before):
        step(torch.randn(6, 4))
    shard(sharded)
    for _ in range(3):
        step(torch.randn(6, 4))
    torch.testing.assert_close(sharded.local, expected[2:5])
    for value in optimizer.state[sharded].values():
        assert value.dim() == 0 or value.local.shape == (3, 4)


def test_it_is_the_same_object_and_the_memory_of_the_rest_is_freed() -> None:
    numpy = pytest.importorskip("numpy")
    memory = numpy.ones((6, 4), dtype=numpy.float32)
    model = nn.Linear(4, 6, bias=False)
    model.weight = parameter = nn.Parameter(torch.from_numpy(memory))
    parameter.tag = "kept"
    freed = weakref.ref(memory)
    del memory
    shard(parameter)
    assert freed() is None
    assert model.weight is parameter
    assert list(model.parameters()) == [parameter] or next(model.parameters()) is parameter
    assert isinstance(parameter, nn.Parameter)
    assert parameter.tag == "kept"
    assert (parameter.shape, parameter.stride(), parameter.numel()) == ((6, 4), (4, 1), 24)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.local.untyped_storage().nbytes() == 3 * 4 * 4
    assert "weight0 [6, 4], of which rank 0 keeps [2:5, 0:4]" in str(parameter)


def test_a_rank_may_keep_nothing() -> None:
    parameter = weight()
    parameter.grad = torch.ones(6, 4)
    optimizer = torch.optim.AdamW([parameter], foreach=True)
    shard(parameter, parts={1: Mask.of((6, 4))})
    optimizer.step()
    assert parameter.local.numel() == parameter.grad.local.numel() == 0
    assert "keeps nothing" in str(parameter)


def test_gradients_that_are_there_are_cut() -> None:
    parameter = weight()
    parameter.grad = gradient = torch.randn(6, 4)
    shard(parameter)
    torch.testing.assert_close(parameter.grad.local, gradient[2:5])
    parameter.grad.zero_()
    assert not parameter.grad.local.any()


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_are_there_are_refused_before_anything_changes(register: str) -> None:
    first, second = weight(), weight()
    handle = getattr(second, register)(lambda _: None)
    with pytest.raises(RuntimeError, match=r"weight1 has hooks .* after the first call"):
        shard(first, second)
    assert type(first) is type(second) is nn.Parameter
    handle.remove()
    shard(first, second)
    assert isinstance(second, ss.ShardedTensor)


def test_what_others_have_wrapped_is_refused() -> None:
    class Other(nn.Parameter):
        pass

    with pytest.raises(TypeError, match=r"weight0 is a Other.*plain parameters"):
        shard(Other(torch.zeros(6, 4)))


def test_parameters_that_every_rank_keeps_whole_stay_as_they_are() -> None:
    parameter = weight()
    shard(parameter, parts=dict.fromkeys((0, 1), Mask.of((6, 4))))
    assert type(parameter) is nn.Parameter


MISUSES: dict[str, Callable[[nn.Linear], Any]] = {
    "eager call": lambda model: model(torch.ones(2, 4)),
    "compiled without a plan": lambda model: torch.compile(model, backend="aot_eager")(torch.ones(2, 4)),
    "sum": lambda model: model.weight.sum(),
    "index": lambda model: model.weight[0],
    "equal": lambda model: torch.equal(model.weight, model.weight),
    "broadcast": lambda model: model.weight + torch.ones(4),
    "random": lambda model: model.weight.detach().normal_(),
    "clip": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "save": lambda model: torch.save(model.state_dict(), io.BytesIO()),
    "pickle": lambda model: pickle.dumps(model),
    "address": lambda model: model.weight.data_ptr(),
    "share": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_what_needs_more_than_the_part_names_the_remedy(misuse: Callable[[nn.Linear], Any]) -> None:
    model = nn.Linear(4, 6, bias=False)
    model.weight.grad = torch.ones(6, 4)
    shard(model.weight)
    with pytest.raises(Exception, match=r"weight0 \[6, 4\], of which rank 0 keeps(.|\n)*state_dict\(model\)"):
        misuse(model)


def test_its_data_cannot_be_replaced_but_be_written() -> None:
    parameter = weight()
    shard(parameter)
    with pytest.raises(RuntimeError, match="copy_"):
        parameter.data = torch.zeros(6, 4)
    whole = torch.randn(6, 4)
    parameter.data.copy_(whole)
    torch.testing.assert_close(parameter.local, whole[2:5])


def test_a_deep_copy_is_a_part_of_its_own() -> None:
    model = nn.Linear(4, 6, bias=False)
    model.weight.grad = torch.ones(6, 4)
    shard(model.weight)
    other = copy.deepcopy(model)
    assert isinstance(other.weight, nn.Parameter)
    with torch.no_grad():
        other.weight.mul_(0)
    assert model.weight.local.all()
    assert other.weight.grad.local.shape == (3, 4)
    average = model.weight.detach().clone().lerp_(other.weight.detach(), 0.5)
    torch.testing.assert_close(average.local, model.weight.local / 2)


def test_parts_of_different_parameters_do_not_mix() -> None:
    first, second = weight(), weight()
    shard(first, second)
    with pytest.raises(RuntimeError, match="do not match"):
        first.detach() + second.detach()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clipping_without_a_plan_is_that_of_torch(norm_type: float) -> None:
    ours, theirs = [weight(), weight(), weight()], [weight(), weight(), weight()]
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        mine.grad = torch.randn(6, 4)
        other.grad = mine.grad.clone()
    got = ss.clip_grad_norm_(iter(ours), 0.5, norm_type)
    torch.testing.assert_close(got, nn.utils.clip_grad_norm_(theirs, 0.5, norm_type))
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])
    ours[0].grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="nan"):
        ss.clip_grad_norm_(ours, 0.5, norm_type, error_if_nonfinite=True)


def test_each_element_is_counted_on_one_rank() -> None:
    parts = {
        0: Mask((Interval(0, 4), Interval(0, 4))),
        1: Mask((Interval(2, 6), Interval(0, 3))),
        2: Mask((Interval(0, 6), Interval(2, 4))),
    }
    times = torch.zeros(6, 4)
    for rank, box in Layout("weight", (6, 4), 0, parts).counted():
        assert parts[rank].contains(box)
        times[box.within(Mask.of((6, 4)))] += 1
    assert times.eq(1).all()


def test_each_element_is_saved_once_and_loaded_by_all_that_keep_it(tmp_path: Path) -> None:
    """torch.distributed.checkpoint, each rank's part of it by hand: these are two ranks, then three."""
    of_two = [{0: rows(0, 4), 1: rows(2, 6)}] * 2
    whole, other = torch.randn(6, 4), torch.randn(3)
    states = [{"w": kept(whole, rank, parts), "plain": other.clone()} for rank, parts in enumerate(of_two)]
    writer, planners = FileSystemWriter(tmp_path), [DefaultSavePlanner(), DefaultSavePlanner()]
    for rank, (planner, state) in enumerate(zip(planners, states, strict=True)):
        planner.set_up_planner(state, is_coordinator=rank == 0)
    writer.set_up_storage_writer(is_coordinator=True)
    local = [writer.prepare_local_plan(planner.create_local_plan()) for planner in planners]
    plans, metadata = planners[0].create_global_plan(local)
    plans = writer.prepare_global_plan(plans)
    written = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for planner, plan in zip(planners, plans, strict=True)
    ]
    writer.finish(metadata, written)
    sizes = [list(chunk.sizes) for chunk in metadata.state_dict_metadata["w"].chunks]
    assert sorted(sizes) == [[2, 4], [4, 4]], "rows 2 to 4 are written by one of both"

    quarter = Mask((Interval(1, 5), Interval(1, 3)))
    for rank, parts in enumerate([{0: rows(0, 2), 1: quarter}] * 3):
        state = {"w": kept(torch.zeros(6, 4), rank, parts), "plain": torch.zeros(3)}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        torch.testing.assert_close(state["w"].local, state["w"].keeps.cut(whole))
        torch.testing.assert_close(state["plain"], other)
    state = {"w": torch.zeros(6, 4), "plain": torch.zeros(3)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    torch.testing.assert_close(state["w"], whole)


def rows(start: int, stop: int) -> Mask:
    return Mask((Interval(start, stop), Interval(0, 4)))


def kept(whole: torch.Tensor, rank: int, parts: Mapping[int, Mask]) -> ss.ShardedTensor:
    layout = Layout("w", (6, 4), rank, parts)
    return ss.ShardedTensor.of(layout.cut(whole).clone(), layout)


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw"], OPTIMIZERS["sgd foreach"]], ids=["adamw", "sgd"])
def test_an_optimizer_that_has_not_stepped_makes_room_for_what_is_loaded(make: Any) -> None:
    parameter = weight()
    before = parameter.detach().clone()
    shard(parameter)
    parameter.grad = gradient = ss.ShardedTensor.of(torch.ones(3, 4), parameter.keeps)
    optimizer = make([parameter])
    state = ss.state_dict(optimizer, whole=False)
    torch.testing.assert_close(parameter.local, before[2:5])
    assert parameter.grad is gradient
    assert optimizer.param_groups[0]["lr"] == 0.1
    moments = [value for value in state["state"][0].values() if value.dim()]
    assert moments
    assert all(isinstance(value, ss.ShardedTensor) and value.local.shape == (3, 4) for value in moments)
    with pytest.raises(ValueError, match="on_rank is 0 with whole=False"):
        ss.state_dict(optimizer, on_rank=0, whole=False)


def test_a_state_dict_shares_nothing_but_what_is_tied() -> None:
    model = Tiny()
    state = ss.state_dict(model)
    assert state["embed.weight"] is state["head.weight"]
    before = state["embed.weight"].clone()
    nn.init.zeros_(model.embed.weight)
    torch.testing.assert_close(state["embed.weight"], before)
    assert state._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="on_rank is 3"):
        ss.state_dict(model, on_rank=3)
