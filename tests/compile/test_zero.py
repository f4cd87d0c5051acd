"""Parameters in shards: right in every stage and composition, gathered while they are used, as small as said."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ready_models import captured, deep_gpt2, gpt2, llama, t5, tied_llama
from test_plans import Make, compiled_by_name, moved
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from virtual import assert_plan_is_right, capture_call, run_plan

import torch_vtensor.compile as ss
from torch_vtensor.compile import Mesh, _torch_compat, virtual_world
from torch_vtensor.compile.backend import Compilation, compile_plan
from torch_vtensor.compile.codegen import CodeGenerator
from torch_vtensor.compile.executor import Code
from torch_vtensor.compile.parameters import part_of
from torch_vtensor.compile.plans import named
from torch_vtensor.compile.schedules.job import Place
from torch_vtensor.compile.segment import Segment

# What is given whole, in shards or for microbatches, over the batch alone or with heads and stages cut as well.
ALONE = ["zero1", "zero1/2", "zero2/2", "zero3", "zero3/2"]
COMPOSED = {"zero1+tp2": 4, "zero3+pp2+1f1b/2": 4, "zero3+pp2+zb/2": 4}
COMPOSED_SLOW = {
    "zero2+tp2+pp2+1f1b/2": 8,
    "zero3+tp2": 4,
    "zero3+sp2": 4,
    "zero1+pp2+1f1b/2": 4,
    "zero2+pp2+1f1b/2": 4,
    "zero3+coshard2": 2,
}


def slow(*values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("make", [tied_llama, *slow(gpt2, t5)])
def test_shards_compute_what_one_process_does(make: Make, name: str) -> None:
    compiled_by_name(make, name, world=2)


@pytest.mark.parametrize("name", [*COMPOSED, *slow(*COMPOSED_SLOW)])
def test_compositions_compute_what_one_process_does(name: str) -> None:
    compiled_by_name(tied_llama, name, world={**COMPOSED, **COMPOSED_SLOW}[name])


def test_each_rank_stores_a_shard_of_what_it_reads() -> None:
    flow = compiled_by_name(llama, "zero1+tp2", world=4).program.flow
    for tensor, parts in flow.storage.items():
        held = sum(mask.num_elements for mask in parts.values())
        assert held == tensor.whole.mask.num_elements, tensor.name


# ------------------------------------------------------------------------------------------------ what is communicated


def test_zero2_adds_up_gradients_for_each_microbatch() -> None:
    num_parameters = len(compiled_by_name(llama, "zero1/2", world=2).program.flow.storage)
    once = moved(compiled_by_name(llama, "zero1/2", world=2), "parameter")
    each = moved(compiled_by_name(llama, "zero2/2", world=2), "parameter")
    assert once == {"all_gather forward": num_parameters, "reduce_scatter backward": num_parameters}
    assert each == {"all_gather forward": num_parameters, "reduce_scatter backward": 2 * num_parameters}


def test_zero3_gathers_again_what_backward_needs() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6)) for _ in range(3))).double()
    compilation = compile_model(model, "zero3/2")
    weights = moved(compilation, "parameter")
    # Twelve parameters in two microbatches; backward needs weights, no biases, and has the last one still.
    assert weights["reduce_scatter backward"] == 2 * 12
    assert weights["all_gather forward"] == 2 * 12 + 2 * 5


@pytest.mark.parametrize("name", ["zero3", "zero3/2", "zero3+chunked_loss2"])
def test_zero3_gathers_what_a_layer_reads_as_one_and_one_layer_ahead(name: str) -> None:
    compilation = compiled_by_name(llama, name, world=2)
    schedule = compilation.schedule
    row = [action.name for action in schedule.actions[0] if action.kind != "FREE"]
    passes = [action.name for action in schedule.compute_actions(0)]
    units = {segment.name: unit_of(compilation, segment) for segment in compilation.program.segments}
    gathers = [name for name in row if is_gather(compilation, name)]
    num_passes, num_waited_for = 0, 0
    for gather in gathers:
        readers = [name for name in passes if set(schedule.jobs[name].reads[0]) & set(schedule.jobs[gather].writes[0])]
        assert len({units[name.split()[1]] for name in readers}) == 1, "what one unit reads"
        num_passes += len(readers)
        # Ahead by the passes of one unit at most: those before its reader that are of another unit come first.
        before = row[row.index(gather) : row.index(readers[0])]
        ahead = {units[name.split()[1]] for name in before if name in passes} - {None, units[readers[0].split()[1]]}
        assert len(ahead) <= 1, f"{gather} is there during {before}"
        num_waited_for += not any(name in passes for name in before)
    assert num_waited_for <= 1, "all but the first move while something is computed"
    read = [name for name in passes if any(is_gathered(compilation, key) for key in schedule.jobs[name].reads[0])]
    assert num_passes == len(read), "no pass waits for more than one gather"


def unit_of(compilation: Compilation, segment: Segment) -> int | None:
    found = {compilation.plan.unit.get(task.operator) for task in segment.tasks}
    return max((unit for unit in found if unit is not None), default=None)


def is_gathered(compilation: Compilation, key: str) -> bool:
    writer = compilation.schedule.flow.writer.get(Place(0, key))
    return writer is not None and is_gather(compilation, writer)


def compile_model(model: nn.Module, name: str) -> Compilation:
    plan = named(name, 2)
    call = capture_call(lambda x: model(x).square().sum(), torch.randn(4, 6, dtype=torch.double))
    return compile_plan(call.captured, plan, Mesh((0, 1), plan.axes), trains=True)


# ------------------------------------------------------------------------------------------------------ what is held


class Watched(Code):
    """Notes, whenever a pass runs, which gathered parameters, and gradients of whole ones, its rank still holds."""

    def __init__(self, code: Code, segment: Segment, gathered: "Gathered") -> None:
        self._code, self._segment, self._gathered = code, segment, gathered

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        self._gathered.look(self._segment.rank, f"F {self._segment.name}")
        return self._code.forward(inputs)

    def backward(self, part: Any, *arguments: Any) -> tuple[Sequence[Tensor | None], Any]:
        self._gathered.look(self._segment.rank, f"{part} {self._segment.name}")
        gradients, kept = self._code.backward(part, *arguments)
        made = zip(self._segment.arrivals, gradients, strict=True)
        whole = [gradient for arrival, gradient in made if arrival.is_weight and gradient is not None]
        self._gathered.note_gradients(self._segment.rank, whole)
        return gradients, kept


class Gathered:
    """The storages of gathered parameters that are alive, by rank and by the job that gathered them."""

    def __init__(self) -> None:
        self._made: dict[Place, list[StorageWeakRef]] = {}
        self._gradients: defaultdict[int, list[list[StorageWeakRef]]] = defaultdict(list)  # of each pass
        self.seen: dict[Place, set[str]] = {}
        self.num_gradients = self.most_passes = 0

    def note(self, rank: int, job: str, tensors: Sequence[Tensor]) -> None:
        self._made[Place(rank, job)] = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def note_gradients(self, rank: int, gradients: Sequence[Tensor]) -> None:
        self._gradients[rank][-1] += [StorageWeakRef(tensor.untyped_storage()) for tensor in gradients]
        self.num_gradients += len(gradients)

    def look(self, rank: int, name: str) -> None:
        self._gradients[rank].append([])
        held = [number for number, some in enumerate(self._gradients[rank]) if not all(one.expired() for one in some)]
        self.most_passes = max([self.most_passes, *(len(self._gradients[rank]) - 1 - number for number in held)])
        mine = {place.key: storages for place, storages in self._made.items() if place.rank == rank}
        self.seen[Place(rank, name)] = {job for job, some in mine.items() if not all(one.expired() for one in some)}


@pytest.mark.parametrize("name", ["zero3/2", "zero3+pp2+zb/2"])
def test_no_rank_holds_a_whole_parameter_longer_than_its_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = 4 if "zb" in name else 2
    _, call = captured(deep_gpt2, False)
    plan = named(name, world)
    compilation = compile_plan(call.captured, plan, Mesh(tuple(range(world)), plan.axes), trains=True)
    program, schedule = compilation.program, compilation.schedule
    given = {tensor: value for tensor, value in zip(call.captured.arguments, call.arguments, strict=True) if tensor}
    given.update(call.captured.constants)
    values: dict[int, dict[str, Any]] = {rank: {} for rank in range(world)}
    for (rank, key), view in program.arguments.items():
        values[rank][key] = part_of(given[view.tensor].detach(), view.mask).clone()
    for (rank, key), tensor in program.seeds.items():
        values[rank][key] = torch.ones(tensor.shape, dtype=tensor.dtype)

    gathers = {job.name for job in program.jobs if is_gather(compilation, job.name)}
    gathered = Gathered()
    wait = virtual_world._Part.wait

    def noted(part: Any) -> Sequence[Tensor]:
        tensors = wait(part)
        if part._box.name in gathers:
            gathered.note(part._rank, part._box.name, tensors)
        return tensors

    monkeypatch.setattr(virtual_world._Part, "wait", noted)
    generate = CodeGenerator("eager", {})
    codes = {segment: Watched(generate(segment), segment, gathered) for segment in program.segments}
    virtual_world.run_all(program, schedule, values, codes.__getitem__, torch.device("cpu"))

    writer = schedule.flow.writer
    num_looked = 0
    for rank in range(world):
        passes = [action.name for action in schedule.compute_actions(rank)]
        reads = [
            {writer[place] for place in schedule.flow.reads[name] if place.rank == rank and place in writer} & gathers
            for name in passes
        ]
        used = [(gather, [n for n, some in enumerate(reads) if gather in some]) for gather in set().union(*reads)]
        spans = {gather: (numbers[0], numbers[-1]) for gather, numbers in used}
        for number, name in enumerate(passes):
            alive = gathered.seen[Place(rank, name)]
            due = {gather for gather, (first, last) in spans.items() if first - 1 <= number <= last}
            assert reads[number] <= alive <= due, f"{name} on rank {rank}"
            num_looked += len(reads[number])
        for first, last in spans.values():
            between = set().union(*reads[first : last + 1])
            assert {spans[gather] for gather in between} == {(first, last)}, "it stays while nothing else is needed"
    assert num_looked > 30
    assert gathered.num_gradients > 100
    if world == 2:  # in a pipeline gradients wait for messages that are in the way
        assert gathered.most_passes == 1, "they are there while the next pass runs, and no longer"


def is_gather(compilation: Compilation, name: str) -> bool:
    return name.startswith("all_gather") and compilation.program.work[name].tensor.kind == "parameter"  # type: ignore[union-attr]


def test_backward_apart_from_forward_gathers_for_itself() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))).double()
    x = torch.randn(4, 6, dtype=torch.double)
    plan = named("zero3/2", 2)
    call = capture_call(lambda x: model(x), x)
    compilation = compile_plan(call.captured, plan, Mesh((0, 1), plan.axes), trains=True)
    program, passes = compilation.program, compilation.passes
    assert passes.backward is not None
    assert program.again
    assert program.again.isdisjoint(passes.forward.jobs)
    assert program.again <= passes.backward.jobs.keys()

    values: dict[int, dict[str, Any]] = {0: {}, 1: {}}
    given = dict(zip(call.captured.arguments, call.arguments, strict=True))
    for (rank, key), view in program.arguments.items():
        values[rank][key] = part_of(given[view.tensor].detach(), view.mask)
    code = {segment: CodeGenerator("eager", {})(segment) for segment in program.segments}
    virtual_world.run_all(program, passes.forward, values, code.__getitem__, torch.device("cpu"))
    parameters = {view.tensor: view for view in program.arguments.values() if view.tensor.kind == "parameter"}
    for held in values.values():
        kept = [value for value in held.values() if isinstance(value, Tensor)]
        assert not any(value.shape == (6, 6) for value in kept), "a whole weight waits for backward"
    for (rank, key), tensor in program.seeds.items():
        values[rank][key] = torch.ones(tensor.shape, dtype=tensor.dtype)
    virtual_world.run_all(program, passes.backward, values, code.__getitem__, torch.device("cpu"))
    model(x).sum().backward()
    expected = dict(model.named_parameters())
    assert len(program.gradients) == 2 * len(parameters)
    for (rank, tensor), (key, mask) in program.gradients.items():
        torch.testing.assert_close(values[rank][key], part_of(expected[tensor.name].grad, mask))


# ----------------------------------------------------------------------------------------------------- what it takes


LAYERS, WIDTH, BATCH = 8, 4096, 4 * 4 * 1024


def at_peak(name: str) -> dict[str, float]:
    """What a rank holds at its peak, by kind, as a part of all parameters."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        x = torch.empty(BATCH, WIDTH)
    plan = named(name, 4)
    explained = ss.explain(lambda x: F.gelu(model(x)).sum(), x, plan=plan, mesh=dict(plan.axes))
    parameters = LAYERS * WIDTH * WIDTH * 4
    memory = explained.compilation.passes.reports[0].memory[0]
    found = {kind: num_bytes / parameters for kind, num_bytes in memory.bytes_by_kind().items()}
    return {**found, "all": memory.peak_bytes / parameters}


def test_each_stage_needs_less_memory_than_the_one_before() -> None:
    one, two, three = (at_peak(name) for name in ("zero1/4", "zero2/4", "zero3/4"))
    shard, layer = 1 / 4, 1 / LAYERS
    assert one["parameter"] == two["parameter"] == 1 + shard
    assert one["gradient"] >= 1
    # A layer's gradients are under way while the next layer makes its own; a shard is added to earlier microbatches'.
    assert two["gradient"] <= shard + 2 * layer + shard * layer
    assert three["parameter"] <= shard + 2 * layer
    assert three["gradient"] <= shard + 2 * layer + shard * layer
    assert one["all"] > two["all"] + 0.5 > three["all"] + 1


def test_explain_shows_what_gathered_parameters_take() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        x = torch.empty(BATCH, WIDTH)
    page = str(ss.explain(lambda x: model(x).sum(), x, plan="zero3/4", mesh=4))
    assert "parameter" in page
    assert "all_gather" in page
    assert "reduce_scatter" in page


@pytest.mark.slow
def test_inductor_generates_code_that_reads_parameters_anew() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6)) for _ in range(2))).double()
    plan, x = named("zero3/2", 2), torch.randn(4, 6, dtype=torch.double)
    assert_plan_is_right(
        model, lambda x: model(x).square().mean(), (x,), plan, Mesh((0, 1), plan.axes), codegen="inductor"
    )


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.weight, 0.5)


def test_inductors_backward_passes_drop_what_forward_dropped() -> None:
    model, plan = nn.Sequential(Scaled(), Scaled()), named("zero3", 2)
    call = capture_call(lambda x: model(x).sum(), torch.ones(4, 64))
    compilation, values = run_plan(call, plan, Mesh((0, 1), plan.axes), codegen="inductor")
    assert any(segment.in_passes for segment in compilation.program.segments)
    loss = next(values[rank][key] for (rank, _), key in compilation.program.outputs.items())
    gradients: dict[str, Tensor] = {"0.weight": torch.zeros(64), "1.weight": torch.zeros(64)}
    for (rank, tensor), (key, mask) in compilation.program.gradients.items():
        gradients[tensor.name][mask.within(tensor.whole.mask)] = values[rank][key]
    # With ones everywhere, all that is left of column n is its part of the loss, and the gradient of both weights n.
    torch.testing.assert_close(gradients["0.weight"], gradients["1.weight"])
    torch.testing.assert_close(gradients["0.weight"].sum(), loss)
    assert loss > 0


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x), classes)


@pytest.mark.parametrize("generates", [False, *slow(True)], ids=["traced", "generated"])
def test_inductors_passes_of_a_cross_entropy_read_parameters_anew(
    generates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not generates:  # all that inductor does to the graphs, which then run as they are
        monkeypatch.setattr(_torch_compat, "generate_with_inductor", lambda graph, *_: _torch_compat.boxed(graph))
        monkeypatch.setattr(_torch_compat, "compile_with_inductor", lambda graph, inputs, settings: graph)
    model, plan = Classifier().double(), named("zero3", 2)
    batch = torch.randn(4, 6, dtype=torch.double), torch.tensor([1, 5, 0, 2])
    compilation = assert_plan_is_right(model, model, batch, plan, Mesh((0, 1), plan.axes), codegen="inductor")
    in_passes = [task.name for segment in compilation.program.segments if segment.in_passes for task in segment.tasks]
    assert any("cross_entropy" in name for name in in_passes)


def test_names_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="a pipeline, whose microbatches are all there are"):
        named("zero3/2+1f1b/2", 4)
