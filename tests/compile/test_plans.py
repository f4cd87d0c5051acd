"""Ready plans compute what one process does, communicate what they say, and refuse what they cannot cut."""

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from ready_models import VOCABULARY, Example, captured, deep_gpt2, evoformer, gpt2, llama, swin, t5, tied_llama
from torch import nn
from virtual import assert_plan_is_right, capture_call, run_plan

from torch_vtensor.compile import Compilation, Graph, Mesh, buckets
from torch_vtensor.compile.backend import compile_plan
from torch_vtensor.compile.buckets import Bucket
from torch_vtensor.compile.communication import Assemble, Transfer
from torch_vtensor.compile.explanation import Explanation
from torch_vtensor.compile.plans import (
    coshard,
    cuts_classes,
    data_parallel,
    gpipe,
    interleaved,
    named,
    one_f_one_b,
    tensor_parallel,
)
from torch_vtensor.compile.plans.layers import few_lookups
from torch_vtensor.compile.plans.zero import zero1
from torch_vtensor.compile.primitives import PlanFunction
from torch_vtensor.compile.program import Forward, Move, Work
from torch_vtensor.compile.task_graph import Task

Make = Callable[[], Example]

ON_ONE_RANK = ["single", "coshard2", "chunked_loss4", "accumulate2+recompute1+chunked_loss2+layerwise"]
SINGLE = [*ON_ONE_RANK, "dp2", "tp2", "sp2", "gpipe/2", "1f1b/4", "zb/4"]
COMPOSED = {
    "dp2+tp2": 4,
    "dp2+1f1b/2": 4,
    "tp2+1f1b/2": 4,
    "tp2+zb/2": 4,
    "dp2+sp2+gpipe/2": 8,
    "tp2+coshard2": 2,
    "1f1b/2+chunked_loss2": 2,
}
WITH_VOCABULARY = {"interlaced/2": 2, "dp2+interlaced/2": 4}


def world_of(name: str) -> int:
    if name in ON_ONE_RANK or name in ("accumulate4", "recompute", "layerwise"):
        return 1
    return COMPOSED.get(name) or WITH_VOCABULARY.get(name) or 2


def assert_right(make: Make, plan: PlanFunction, mesh: Mesh) -> Compilation:
    example, call = captured(make, cuts_classes(plan))
    return assert_plan_is_right(
        example.model, example.loss_of, example.arguments, plan, mesh, example.tolerance, call=call
    )


def compiled_by_name(make: Make, name: str, world: int | None = None) -> Compilation:
    plan = named(name, world or world_of(name))
    return assert_right(make, plan, Mesh(tuple(range(world or world_of(name))), plan.axes))


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("make", [gpt2, llama, t5, swin, evoformer])
def test_a_plan_computes_what_one_process_does(make: Make, name: str) -> None:
    compiled_by_name(make, name)


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("make", [tied_llama, evoformer])
def test_a_composition_computes_what_one_process_does(make: Make, name: str) -> None:
    compiled_by_name(make, name)


@pytest.mark.parametrize("name", WITH_VOCABULARY)
@pytest.mark.parametrize("make", [llama, tied_llama, t5])
def test_a_vocabulary_over_a_pipeline_computes_what_one_process_does(make: Make, name: str) -> None:
    compiled_by_name(make, name)


@pytest.mark.parametrize("name", ["interleaved*2/4", "dp2+interleaved*2/2"])
@pytest.mark.parametrize("make", [deep_gpt2, t5])
def test_interleaved_stages_compute_what_one_process_does(make: Make, name: str) -> None:
    compiled_by_name(make, name, world=4 if "dp2" in name else 2)


@pytest.mark.parametrize("plan", [zero1, named("zero1", 2)])
def test_sharded_parameters_compute_what_one_process_does(plan: PlanFunction) -> None:
    compilation = assert_right(llama, plan, Mesh((0, 1), {"dp": 2}))
    gradients = compilation.program.gradients.items()
    halves = {
        tensor.name for (_, tensor), (_, mask) in gradients if mask.num_elements * 2 == tensor.whole.mask.num_elements
    }
    assert halves == {tensor.name for tensor in compilation.captured.graph.inputs if tensor.kind == "parameter"}


# ------------------------------------------------------------------------------------------------ what is communicated


def test_a_stage_computes_what_no_gradient_flows_through_where_it_has_its_inputs() -> None:
    """The part of a loss with cut classes that is detached: nobody gathers logits for it."""
    compilation = compiled_by_name(llama, "pp2+dp2+tp2+1f1b/2", world=8)
    logits = {move.tensor.name for move in compilation.program.moves if move.tensor.shape[-1:] == (VOCABULARY,)}
    assert not logits


def moved(compilation: Compilation, kind: str) -> Counter[str]:
    """How often tensors of a kind are communicated, by way and direction; tensors of one number do not count."""
    count: Counter[str] = Counter()
    for job in compilation.program.jobs:
        for work in moves_of(compilation.program.work[job.name]):
            if not isinstance(work.step, Assemble) and work.tensor.shape:
                backward = any(key.startswith("d ") for keys in job.writes.values() for key in keys)
                way = "transfer" if isinstance(work.step, Transfer) else work.step.kind
                if work.tensor.kind == kind:
                    count[f"{way} {'backward' if backward else 'forward'}"] += 1
    return count


def lookups(compilation: Compilation) -> set[tuple[int, int | None]]:
    """The rows of each table that is looked up, and in which microbatch."""
    plan = compilation.program.flow.plan
    tasks = (task for task in plan.tasks if "embedding" in str(task.operator.target))
    return {(task.operator.inputs[0].shape[0], plan.microbatch.get(task)) for task in tasks}


def moves_of(work: Work) -> tuple[Move, ...]:
    """The steps of communication that a job takes."""
    return work.moves if isinstance(work, Bucket) else (work,) if isinstance(work, Move) else ()


def test_gradients_of_a_pass_move_in_buckets_that_hold_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    example, call = captured(llama, False)
    collectives = {}
    for limit in (buckets.BUCKET_BYTES, 16 * 1024, 0):
        monkeypatch.setattr(buckets, "BUCKET_BYTES", limit)
        for name in ("dp2", "zero2/2"):
            plan = named(name, 2)
            compilation = assert_plan_is_right(
                example.model, example.loss_of, example.arguments, plan, Mesh((0, 1)), example.tolerance, call=call
            )
            for bucket in compilation.program.buckets:
                num_bytes = sum(step.inputs[0].mask.num_elements * 8 for step in bucket.steps)
                assert num_bytes <= limit or bucket.steps[0].kind == "all_gather"
            kinds = ("all_reduce", "reduce_scatter")
            jobs = [job.name for job in compilation.program.jobs if job.name.startswith(kinds)]
            collectives[name, limit] = len(jobs)
            if limit:
                assert f"in {len(compilation.program.buckets)} buckets" in str(Explanation(compilation))
    assert collectives["dp2", 25 * 2**20] == 3  # of the loss, of the count of its rows, and of all gradients
    for name in ("dp2", "zero2/2"):
        most, some, one = (collectives[name, limit] for limit in (25 * 2**20, 16 * 1024, 0))
        assert most < some < one


def test_data_parallel_moves_gradients_of_parameters_only() -> None:
    compilation = compiled_by_name(llama, "dp2")
    assert moved(compilation, "activation") == {}
    parameters = sum(tensor.kind == "parameter" for tensor in compilation.captured.graph.inputs)
    assert moved(compilation, "parameter") == {"all_reduce backward": parameters}


def test_tensor_parallel_adds_up_twice_a_layer_forward_and_twice_backward() -> None:
    example, call = captured(llama, False)
    plan = partial(tensor_parallel, vocabulary=False)
    compilation = assert_plan_is_right(
        example.model, example.loss_of, example.arguments, plan, Mesh((0, 1)), example.tolerance, call=call
    )
    assert moved(compilation, "activation") == {"all_reduce forward": 4, "all_reduce backward": 4}


def test_a_cut_vocabulary_moves_no_logits() -> None:
    for name in ("tp2", "interlaced/2"):
        compilation = compiled_by_name(t5, name)
        rows = [
            work.step.bytes_sent(job.ranks[0], 1)
            for job in compilation.program.jobs
            if isinstance(work := compilation.program.work[job.name], Move)
            and not isinstance(work.step, Assemble)
            and work.tensor.kind != "parameter"
            and 512 in work.tensor.shape
        ]
        assert rows == []
        # Nor does one segment hand them to another, of which a compiler could fuse nothing with what makes them.
        left = [view for segment in compilation.program.segments for view in segment.departures]
        assert not [view for view in left if 512 in view.tensor.shape and view.tensor.kind != "parameter"]
    assert {own for table, own in lookups(compilation) if table == 512} == {None}, "once for all microbatches"


def test_sequence_parallel_scatters_what_tensor_parallel_adds_up() -> None:
    activations = moved(compiled_by_name(llama, "sp2"), "activation")
    # Embedding and two blocks in each of two layers; three sums of one number a row belong to the loss.
    assert activations["reduce_scatter forward"] == 5
    assert activations["all_reduce forward"] == 3
    assert activations["reduce_scatter backward"] == 4
    assert activations["all_gather forward"] == activations["all_gather backward"] == 5


@pytest.mark.parametrize(("name", "recomputed"), [("coshard2", 8), ("chunked_loss4", 0)])
def test_pieces_on_one_device_move_nothing_and_run_in_turn(name: str, recomputed: int) -> None:
    compilation = compiled_by_name(llama, name)
    assert moved(compilation, "activation") == moved(compilation, "parameter") == {}
    assert len({segment.turn for segment in compilation.program.segments if segment.recomputes}) == recomputed
    order = [
        compilation.program.work[action.name].segment.turn
        for action in compilation.schedule.actions[0]
        if action.kind == "F" and isinstance(compilation.program.work[action.name], Forward)
    ]
    turns = [turn for turn in order if turn is not None]
    assert turns == sorted(turns)


def test_a_chunked_loss_goes_backward_piece_by_piece() -> None:
    compilation = compiled_by_name(llama, "chunked_loss4")
    of_tail = [
        (action.kind, work.segment.turn[1])
        for action in compilation.schedule.compute_actions(0)
        if (work := compilation.program.work[action.name]).segment.turn is not None
    ]
    assert list(dict.fromkeys(of_tail)) == [(kind, piece) for piece in range(4) for kind in "FB"]


def test_pieces_of_what_is_no_loss_are_recomputed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    call = capture_call(lambda x: model(x).exp(), torch.randn(4, 4))
    compilation = compile_plan(call.captured, named("chunked_loss2", 1), Mesh(), trains=True)
    pieces = [segment for segment in compilation.program.segments if segment.turn is not None]
    assert [segment.recomputes for segment in pieces] == [True, True]


@pytest.mark.parametrize("name", ["recompute", "layerwise"])
def test_layers_are_segments_of_their_own(name: str) -> None:
    compilation = compiled_by_name(llama, name)
    of_layers = [
        segment
        for segment in compilation.program.segments
        if any("mlp" in task.operator.module for task in segment.tasks)
    ]
    first, second = ({task.operator.module for task in segment.tasks} for segment in of_layers)
    assert not first & second
    assert all(segment.recomputes == (name == "recompute") for segment in of_layers)


# ------------------------------------------------------------------------------------------------------ what order


def passes(compilation: Compilation, rank: int) -> str:
    """The rank's passes through which gradients flow, in order: digits forward, letters backward, capitals dW."""
    flowing = {segment.name: segment for segment in compilation.program.segments if segment.flows}
    found = [
        {"F": "0123456789", "dW": "ABCDEFGHIJ"}.get(action.kind, "abcdefghij")[action.microbatch]
        for action in compilation.schedule.compute_actions(rank)
        if action.microbatch is not None and action.name.split(" ", 1)[1] in flowing
    ]
    return "".join(name for name, _ in itertools.groupby(found))


@pytest.mark.parametrize(
    ("name", "orders"),
    [
        ("gpipe/4", ["0123abcd", "0123abcd"]),
        ("1f1b/4", ["01a2b3cd", "0a1b2c3d"]),
        ("zb/4", ["01aA2bB3cCdD", "0a1bA2cB3dCD"]),
        ("zbh2/4", ["012aA3bBcCdD", "0a1b2cA3dBCD"]),
        ("accumulate4", ["0a1b2c3d"]),
    ],
)
def test_a_pipeline_runs_in_its_order(name: str, orders: list[str]) -> None:
    compilation = compiled_by_name(gpt2, name)
    assert [passes(compilation, rank) for rank in compilation.schedule.actions] == orders


def test_interleaved_stages_run_round_and_round() -> None:
    compilation = compiled_by_name(deep_gpt2, "interleaved*2/2", world=2)
    assert [passes(compilation, rank) for rank in (0, 1)] == ["0101abab", "010a1bab"]


def test_a_pipeline_passes_each_microbatch_once_each_way() -> None:
    activations = moved(compiled_by_name(gpt2, "1f1b/4"), "activation")
    assert activations == {"transfer forward": 4, "transfer backward": 4}


@pytest.mark.parametrize("num_tokens", [8, 9])
def test_what_a_lookup_finds_is_kept_if_it_is_no_more_than_the_table(num_tokens: int) -> None:
    table = nn.Embedding(8, 4)
    call = capture_call(lambda x: table(x).sum(), torch.zeros(1, num_tokens, dtype=torch.long))
    found: list[frozenset[Task]] = []
    run_plan(call, lambda graph, mesh: found.append(few_lookups(graph)), Mesh((0,)))
    assert bool(found[0]) is (num_tokens == 8)


def test_what_layers_look_up_by_what_they_computed_is_looked_up_in_each_microbatch() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.book = nn.Linear(8, 64), nn.Embedding(64, 8)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = h + self.book(self.router(h).argmax(-1))
            return made

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layers = nn.Embedding(64, 8), nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h: torch.Tensor = self.table(x)
            for layer in self.layers:
                h = layer(h)
            return h

    model = Model().double()

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(x).square().mean()
        return loss

    x = torch.randint(64, (6, 3))
    assert_plan_is_right(model, loss_of, (x,), named("1f1b/3", 2), Mesh((0, 1), {"pp": 2}), 1e-9)
    with pytest.raises(ValueError, match=r"embedding.* needs what microbatches compute"):
        run_plan(
            capture_call(loss_of, x),
            lambda graph, mesh: graph.microbatch(
                3, whole={task for task in graph.tasks if "embedding" in str(task.operator.target)}
            ),
            Mesh((0,)),
        )


# --------------------------------------------------------------------------------------------------- what is refused


def record_of(make: Make, plan: PlanFunction, mesh: Mesh) -> None:
    _, call = captured(make, False)
    run_plan(call, plan, mesh)


@pytest.mark.parametrize(
    ("plan", "mesh", "message"),
    [
        (gpipe, Mesh((0, 1, 2)), "2 layers cannot make 3 stages; choose 1 to 2"),
        (partial(interleaved, num_microbatches=3), Mesh((0, 1)), "3 are not whole groups. Use a multiple of 2"),
        (interleaved, Mesh((0, 1)), "2 layers cannot make 4 stages; choose 1 to 2"),
        (partial(one_f_one_b, num_microbatches=5), Mesh((0, 1)), "4 indices cannot be cut into 5 parts"),
        (data_parallel, Mesh(tuple(range(5))), "4 indices cannot be cut into 5 parts"),
        (tensor_parallel, Mesh(tuple(range(4))), r"k_proj.weight:0 can be cut into at most 2 pieces.*'tp' has 4 parts"),
        (tensor_parallel, Mesh((0, 1), {"dp": 2}), "has no axis 'tp'"),
        (partial(coshard, layers="blocks.*"), Mesh((0,)), "no module matches 'blocks.*'"),
    ],
)
def test_what_does_not_fit_is_refused(plan: PlanFunction, mesh: Mesh, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_of(llama, plan, mesh)


def test_a_pipeline_comes_before_plans_that_cut_its_stages() -> None:
    def wrong(graph: Graph, mesh: Mesh) -> None:
        tensor_parallel(graph, mesh)
        one_f_one_b(graph, mesh, num_microbatches=2)

    with pytest.raises(ValueError, match="a pipeline comes first"):
        record_of(llama, wrong, Mesh((0, 1)))


def test_a_model_without_layers_is_told_how_to_name_them() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}).double()
    x = torch.randn(4, 4, dtype=torch.double)
    call = capture_call(lambda x: model["second"](torch.tanh(model["first"](x))).sum(), x)
    with pytest.raises(ValueError, match=r"no layers.*'first', 'second'.*layers='blocks_\*'"):
        run_plan(call, gpipe, Mesh((0, 1)))


def test_a_model_without_vocabulary_is_not_interlaced() -> None:
    with pytest.raises(ValueError, match="no vocabulary to cut"):
        record_of(swin, named("interlaced/2", 2), Mesh((0, 1), {"pp": 2}))


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "world", "axes"),
    [
        ("single", 1, {}),
        ("dp", 4, {"dp": 4}),
        ("dp2+tp2", 4, {"dp": 2, "tp": 2}),
        ("tp2+dp", 8, {"dp": 4, "tp": 2}),
        ("1f1b/8", 4, {"pp": 4}),
        ("zero3/4", 4, {"dp": 4}),
        ("zero2+tp2+pp2+1f1b/8", 8, {"pp": 2, "dp": 2, "tp": 2}),
        ("pp4+zb/8", 4, {"pp": 4}),
        ("3f1b/4", 2, {"pp": 2}),
        ("sp2+dp2+interleaved*2/8", 16, {"pp": 4, "dp": 2, "tp": 2}),
        ("pp2+gpipe+dp", 8, {"pp": 2, "dp": 4}),
        ("coshard4+chunked_loss", 1, {}),
    ],
)
def test_a_name_gives_a_mesh(name: str, world: int, axes: dict[str, int]) -> None:
    plan = named(name, world)
    assert dict(plan.axes) == axes
    assert list(plan.axes) == list(axes)


@pytest.mark.parametrize(
    ("name", "world", "message"),
    [
        ("dp2+tq2", 4, "unknown part 'tq2'. Did you mean .* Parts are single, pp, dp"),
        ("dp2+", 2, "unknown part ''"),
        ("dp2+dp2", 4, "'dp' twice"),
        ("tp2+sp2", 4, "exclude each other"),
        ("zero1+dp2", 4, "one of dp, zero1, zero2, zero3"),
        ("zero1+zero2", 4, "exclude each other"),
        ("zero2/4+1f1b/2", 4, "Say them there, as in 'zero1.1f1b/8'"),
        ("gpipe+1f1b", 4, "choose one pipeline of gpipe, 1f1b"),
        ("single+dp2", 2, "'single' alone"),
        ("tp2+chunked_loss2", 2, "along the vocabulary, over ranks, and along the batch"),
        ("pp2+dp2", 4, "in no order; add one of gpipe, 1f1b"),
        ("dp+tp", 4, "leaves the sizes of dp and tp open, so that 4 ranks"),
        ("dp2+tp2", 2, "is for dp 2 × tp 2, and the world has 2 ranks: the product has to be 2.*start 4 processes"),
        ("tp3+1f1b", 4, "is for tp 3 × pp \\?, and the world has 4 ranks"),
        ("coshard2", 2, "is for one rank, and the world has 2 ranks"),
        ("dp0", 2, "'dp0', whose numbers mean nothing"),
        ("dp2/4", 2, "'dp2/4', whose numbers mean nothing"),
        ("gpipe4", 2, "1f1b/8 or zero2/8 for microbatches"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(name, world)


def test_a_named_plan_says_its_name() -> None:
    assert str(named("1f1b+dp2", 8)) == "1f1b+dp2 over pp 4 × dp 2"


class HalfBlock(nn.Module):
    """A perceptron that casts its weights as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.linear(x, self.up.weight.double(), self.up.bias.double()).relu()
        return x + nn.functional.linear(inner, self.down.weight.double(), self.down.bias.double())


def test_weights_that_are_cast_in_forward_are_cut() -> None:
    model = nn.Sequential(HalfBlock(), HalfBlock())
    x = torch.randn(4, 4, dtype=torch.double)
    compilation = assert_plan_is_right(
        model, lambda x: model(x).square().mean(), (x,), named("tp2", 2), Mesh((0, 1), {"tp": 2}), 1e-5
    )
    kept = {tensor.name: parts[0].shape for tensor, parts in compilation.program.flow.storage.items()}
    assert (kept["0.up.weight"], kept["0.down.weight"]) == ((4, 4), (4, 4))


def test_a_model_without_anything_to_cut_is_not_tensor_parallel() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    call = capture_call(lambda x: model(x).sum(), torch.ones(4, 4))
    for plan in (named("tp2", 2), named("sp2", 2)):
        with pytest.raises(ValueError, match=r"none of the 2 layers has heads or a hidden dimension"):
            compile_plan(call.captured, plan, Mesh((0, 1), {"tp": 2}), trains=True)
