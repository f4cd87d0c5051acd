"""Every private torch API of the compiler half, behind functions that say what we want from it.

Inductor is driven from outside, through its own extension points: `compile_fx` does all that it does for
``backend="inductor"`` (decompositions, AOTAutograd, static inputs, CUDA graph settings, caches), and hands us each
graph at two places, the partitioner (training) and `inner_compile` (every graph).

| what we use | for |
| --- | --- |
| `_inductor.compile_fx`: `compile_fx`, `compile_fx_inner`, `partition_fn`, `_recursive_joint_graph_passes` | driving |
| `_guards.TracingContext.fw_metadata`, whose `bw_donated_idxs` inductor reads | backward passes that write in place |
| `_inductor.virtualized.V.set_fake_mode` | cutting joint graphs that draw random numbers |
| `_inductor.config`: `custom_partitioner_fn`, `use_joint_graph_passes`; `CustomPartitionerFn` | the joint graph |
| `_functorch.config`: `enable_autograd_cache`, `enable_remote_autograd_cache` | running the phases every time |
| `_inductor`: `list_mode_options`, `list_options`; `cudagraph_trees.reset_cudagraph_trees` | options, reset |
| `utils._pytree.tree_leaves`; `_ops.OperatorBase`; `_boxed_call` on a function | calling conventions, names |
| node meta `desc`, `nn_module_stack`, `fwd_nn_module_stack`, `grapharg` | names |
| `_functorch.aot_autograd.aot_export_module(pre_dispatch=True)`, `FakeTensorMode` | the forward program, for a plan |
| `fx.experimental.proxy_tensor.make_fx`, `_dispatch.python.enable_python_dispatcher` | joint graphs of segments |
| `func.functionalize`; `_inductor.decomposition.select_decomp_table` | those that overwrite, and those for inductor |
| `Tensor._make_wrapper_subclass`, `_C._disabled_torch_function_impl`, `__tensor_flatten__` | sharded tensors |
| `__create_write_items__`, `__create_chunk_list__`, `__get_tensor_shard__` for DCP | checkpoints in parts |
| `_amp_foreach_non_finite_check_and_unscale_` | `torch.amp.GradScaler` on parts |
| `_C._swap_tensor_impl`, `_is_param`, `_backward_hooks`, `_post_accumulate_grad_hooks` | parameters sharded in place |
| `distributed.distributed_c10d._coalescing_manager` | collectives of several tensors in one call |
| `ProcessGroup._device_types`, `_get_backend`, its `options._timeout` | how long collectives of a group may take |
| `_dynamo.config.run_gc_after_compile`; `_dynamo.exc.BackendCompilerFailed` | graphs to look at |
| `_C._get_dispatch_mode`, `_schema`, `Tag.pointwise` | telling operators apart |

Run on torch 2.13.0 and 2.15.0. tests/compile/test_torch_compat.py fails by name when one of these moves.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Protocol, Self, cast

import torch
from torch.fx import GraphModule, Node

BoxedCallable = Callable[[list[Any]], Any]
"""Takes its arguments as one list, which it empties, so that they can be freed while it runs."""

CutInTwo = Callable[[GraphModule], tuple[GraphModule, GraphModule]]
"""Cuts a joint graph into a forward and a backward graph, deciding what is saved and what is recomputed."""

Generate = Callable[[GraphModule], BoxedCallable]
"""Generates code for a forward, backward or inference graph as inductor does."""


class GraphCompiler(Protocol):
    """What `drive_inductor` asks for each graph that AOTAutograd captures."""

    cache_key: str | None
    """Names what this compiler does to graphs, so that AOTAutograd may keep results over processes and skip it where it
    has one. None: the compiler sees every graph."""

    def split(self, joint: GraphModule, min_cut: CutInTwo) -> tuple[GraphModule, GraphModule]:
        """Cut a joint graph into the forward and the backward graph."""

    def emit(self, graph: GraphModule, generate: Generate, *, inference: bool) -> BoxedCallable:
        """Turn a forward, backward or inference graph into what runs it."""


def drive_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], compiler: GraphCompiler, config_patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a dynamo graph as inductor does, except that `compiler` sees and may replace every captured graph.

    Graphs arrive as AOTAutograd captured them: inductor's own joint-graph passes are held back until `min_cut` or
    `generate` is called, which then treat the graph exactly as ``backend="inductor"`` would.
    """
    from torch._functorch import config as aot_config
    from torch._inductor import compile_fx, config
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    held_back = ("custom_partitioner_fn", "use_joint_graph_passes")
    as_asked = {name: config_patches.get(name, getattr(config, name)) for name in held_back}

    class Partitioner(CustomPartitionerFn):
        def __call__(
            self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
        ) -> tuple[GraphModule, GraphModule]:
            kwargs.pop("compiler", None)

            def min_cut(joint: GraphModule) -> tuple[GraphModule, GraphModule]:
                with config.patch(as_asked):
                    return compile_fx.partition_fn(joint, joint_inputs, **kwargs)

            return min_cut(gm) if _is_nested_region(gm) else compiler.split(gm, min_cut)

        def uuid(self) -> str | None:
            return compiler.cache_key

        def __reduce__(self) -> tuple[type[str], tuple[str]]:
            # Cache keys are made by pickling the configuration, this object in it.
            return str, (str(compiler.cache_key),)

    def inner_compile(gm: GraphModule, example_inputs: Sequence[Any], **hints: Any) -> Any:
        inference = bool(hints.get("is_inference"))

        def generate(graph: GraphModule) -> BoxedCallable:
            with config.patch(as_asked):
                if inference:
                    graph = _run_joint_graph_passes(graph, example_inputs)
                compiled: BoxedCallable = compile_fx.compile_fx_inner(graph, example_inputs, **hints)
            return compiled

        return compiler.emit(gm, generate, inference=inference)

    patches = {**config_patches, "custom_partitioner_fn": Partitioner(), "use_joint_graph_passes": False}
    uncached = aot_config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False)
    with uncached if compiler.cache_key is None else contextlib.nullcontext():
        compiled = compile_fx.compile_fx(gm, example_inputs, inner_compile=inner_compile, config_patches=patches)
    return cast(Callable[..., Any], compiled)


def _run_joint_graph_passes(graph: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """What inductor does to an inference graph first: the passes that it otherwise runs before partitioning."""
    from torch._inductor.compile_fx import _recursive_joint_graph_passes

    visible_outputs = _output_node(graph).meta.get("user_visible_output_idxs")
    kwargs: dict[str, Any] = {}
    if "input_device" in inspect.signature(_recursive_joint_graph_passes).parameters:
        values = [*example_inputs, *(node.meta.get("val") for node in graph.graph.nodes)]
        devices = (value.device for value in values if isinstance(value, torch.Tensor) and not value.is_meta)
        kwargs["input_device"] = next(devices, None)
    # Some releases change the graph in place and return nothing.
    graph = _recursive_joint_graph_passes(graph, **kwargs) or graph
    if visible_outputs is not None:
        _output_node(graph).meta.setdefault("user_visible_output_idxs", visible_outputs)
    return graph


def _is_nested_region(joint: GraphModule) -> bool:
    """True for the body of a higher-order operator, which AOTAutograd partitions before the graph that holds it."""
    return not any("desc" in node.meta for node in joint.graph.find_nodes(op="placeholder"))


def _output_node(graph: GraphModule) -> Node:
    node: Node = next(iter(reversed(graph.graph.nodes)))
    return node


def boxed(graph: GraphModule) -> BoxedCallable:
    """A graph run operator by operator, as AOTAutograd calls compiled code."""

    def run(arguments: list[Any]) -> Any:
        values = list(arguments)
        arguments.clear()
        return graph(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def leaves(example_input: object) -> list[Any]:
    """The inputs that a dynamo input becomes in the captured graph: itself, or what a list of them holds."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(example_input)


def source_of(placeholder: Node) -> str | None:
    """Where dynamo found an input: ``L['self']._modules['head']._parameters['weight']``; None if it did not say."""
    argument = placeholder.meta.get("grapharg")
    if argument is None or getattr(argument, "source", None) is None:
        return None
    name = argument.source.name  # a method in some releases
    return str(name() if callable(name) else name)


def operator_name(node: Node) -> str:
    """``aten.mm.default``, or the name of a Python function such as ``getitem``."""
    if isinstance(node.target, torch._ops.OperatorBase):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def is_nested_region(node: Node) -> bool:
    """Whether a node calls a higher-order operator, which has a graph of its own."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def original_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that torch.compile was given, where it returned this one; any other function itself."""
    original: Callable[..., Any] = getattr(function, "_torchdynamo_orig_callable", function)
    return original


def module_path_of(node: Node) -> str | None:
    """The innermost module that made this operator, forward or backward: ``L['self'].layers.0``; None outside any."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    return None if not stack else str(next(reversed(stack.values()))[0])


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings for a mode of torch.compile; raises for an unknown mode, naming the known ones."""
    from torch._inductor import list_mode_options

    return list_mode_options(mode)


def inductor_option_names() -> list[str]:
    """Every setting that inductor knows."""
    from torch._inductor import list_options

    return list_options()


def reset_cuda_graphs() -> None:
    """Forget the CUDA graphs that inductor recorded; nothing to do where it recorded none."""
    if "torch._inductor.cudagraph_trees" in sys.modules:
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def trace_forward(
    gm: GraphModule, example_inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]]
) -> tuple[GraphModule, dict[int, int]]:
    """A dynamo graph as functional aten operators that autograd and autocast have not taken apart.

    Operators that `decompositions` names are replaced by what these call.

    Returns the graph, whose inputs are the leaves of the examples, and for each of its first outputs that is the new
    value of an input, the position of that input.

    Effects: a dynamic size becomes the example's, with a guard on it.
    """
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses import FakeTensor, FakeTensorMode
    from torch.utils._pytree import tree_map

    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        if isinstance(value, WrapperTensor):
            return torch.nn.Parameter(_fake_like(mode, value), value.requires_grad)
        if isinstance(value, FakeTensor):  # dynamo's, of a mode of its own
            with mode:
                like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            return like.requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value, static_shapes=True)
        return int(value) if isinstance(value, torch.SymInt) else value

    def outermost(decompose: Callable[..., Any]) -> Callable[..., Any]:
        inside = False

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return NotImplemented  # the operator itself, which a decomposition may call
            inside = True
            try:
                return decompose(*args, **kwargs)
            finally:
                inside = False

        return call

    table = {operator: outermost(decompose) for operator, decompose in decompositions.items()}
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        if isinstance(size := placeholder.meta.get("example_value"), torch.SymInt):
            int(size)  # makes the guard
    fakes = [tree_map(fake, value) for value in example_inputs]
    with mode, torch.enable_grad():
        traced, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions=table)
    assert isinstance(traced, GraphModule)
    overwritten = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    positions = {node.name: index for index, node in enumerate(traced.graph.find_nodes(op="placeholder"))}
    return traced, {output: positions[name] for output, name in enumerate(overwritten)}


def compile_with_inductor(graph: GraphModule, inputs: Sequence[torch.Tensor], settings: Mapping[str, Any]) -> Any:
    """A graph of aten operators, compiled; differentiable where these inputs want gradients."""
    from torch._inductor import compile_fx

    return compile_fx.compile_fx(graph, list(inputs), config_patches=dict(settings))


def trace_joint(
    function: GraphModule, inputs: Sequence[torch.Tensor], wants: Sequence[bool], *, generates: bool
) -> tuple[GraphModule, int, list[int]]:
    """A function and its gradients as one graph of functional operators, which inductor can compile if it `generates`.

    The graph's inputs are ``primals_i``, the function's, and ``tangents_i``, the gradients of those outputs that have
    one; its outputs those of the function, then a gradient for each input, None where none is wanted or there is none.

    Returns the graph, how many of its outputs are the function's, and which of these have a tangent.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def joint(*values: torch.Tensor) -> list[torch.Tensor | None]:
        leaves = [
            value.detach().requires_grad_(wanted) for value, wanted in zip(values[: len(wants)], wants, strict=True)
        ]
        outputs = function(*leaves)
        gradients = iter(
            torch.autograd.grad(
                [outputs[index] for index in flowing],
                [leaf for leaf in leaves if leaf.requires_grad],
                values[len(wants) :],
                allow_unused=True,
            )
        )
        return [*(output.detach() for output in outputs), *(next(gradients) if wanted else None for wanted in wants)]

    mode = FakeTensorMode()
    table = select_decomp_table() if generates else {}
    with mode, enable_python_dispatcher(), torch.enable_grad():
        primals = [torch.empty(value.shape, dtype=value.dtype, device=value.device) for value in inputs]
        outputs = function(*(value.requires_grad_(wanted) for value, wanted in zip(primals, wants, strict=True)))
        flowing = [index for index, output in enumerate(outputs) if output.requires_grad]
        tangents = [torch.empty(outputs[i].shape, dtype=outputs[i].dtype, device=outputs[i].device) for i in flowing]
        values = [*(value.detach() for value in primals), *tangents]
        traced = make_fx(joint, decomposition_table=table)(*values)
        if any(_is_mutable(node) for node in traced.graph.nodes):
            traced = make_fx(torch.func.functionalize(traced, remove="mutations"))(*values)
    names = [*(f"primals_{index}" for index in range(len(inputs))), *(f"tangents_{index}" for index in flowing)]
    for placeholder, name in zip(traced.graph.find_nodes(op="placeholder"), names, strict=True):
        placeholder.name = placeholder.target = name
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced, len(outputs), flowing


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_view(node: Node) -> bool:
    """Whether what a node makes shares the memory of what it reads."""
    return isinstance(node.target, torch._ops.OpOverload) and any(
        argument.alias_info is not None and not argument.alias_info.is_write
        for argument in node.target._schema.arguments
    )


def partition(joint: GraphModule, num_outputs: int, settings: Mapping[str, Any]) -> tuple[GraphModule, GraphModule]:
    """Cut a joint graph as inductor does: what is saved, and what cheap work backward does again, is up to it."""
    from torch._inductor import compile_fx, config
    from torch._inductor.virtualized import V

    inputs = [node.meta["val"] for node in joint.graph.find_nodes(op="placeholder")]
    # Patterns that are replaced make tensors: fake ones. So do random numbers, in the mode that inductor knows.
    with config.patch(dict(settings)), inputs[0].fake_mode, V.set_fake_mode(inputs[0].fake_mode):
        return compile_fx.partition_fn(joint, inputs, num_fwd_outputs=num_outputs, static_lifetime_input_indices=[])


def generate_with_inductor(
    graph: GraphModule, inputs: Sequence[torch.Tensor], settings: Mapping[str, Any], donated: Collection[int] = ()
) -> BoxedCallable:
    """Code for a graph of functional operators without gradients, for inputs of these sizes and strides.

    It may write over ``donated`` inputs, which nobody else has or may read any more.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, config
    from torch._subclasses import FakeTensor, FakeTensorMode

    values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)]
    mode = values[0].fake_mode if values else FakeTensorMode()
    fakes = [mode.from_tensor(value, static_shapes=True) for value in inputs]
    if not donated:
        with config.patch(dict(settings)):
            return cast(BoxedCallable, compile_fx.compile_fx_inner(graph, fakes))
    # Inductor's cache tells graphs apart by their code, and not by what may be written over.
    placeholders = graph.graph.find_nodes(op="placeholder")
    for index in donated:
        placeholders[index].name = placeholders[index].target = f"donated_{placeholders[index].name}"
    graph.recompile()
    # Inductor asks AOTAutograd's notes, of backward graphs.
    context = TracingContext(mode)
    context.fw_metadata = SimpleNamespace(bw_donated_idxs=list(donated), static_input_indices=[])  # type: ignore[assignment]
    with config.patch(dict(settings)), tracing(context):
        return cast(BoxedCallable, compile_fx.compile_fx_inner(graph, fakes, is_backward=True))


def without_memory(inputs: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
    """Fake tensors for inputs given by shape, dtype and whether they want a gradient."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return [torch.empty(shape, dtype=dtype, device=device, requires_grad=wants) for shape, dtype, wants in inputs]


def trace_passes(
    graph: GraphModule, inputs: Sequence[Any], settings: Mapping[str, Any], device: torch.device
) -> tuple[GraphModule, GraphModule | None]:
    """The forward and the backward graph that inductor would generate code for, and nothing generated.

    ``inputs`` are a shape, a dtype and whether it wants a gradient for each input of the graph; nothing is computed.
    There is no backward graph where no input wants a gradient.
    """
    from torch._subclasses import FakeTensorMode

    found: list[GraphModule | None] = []

    class Recorder:
        cache_key: str | None = None

        def split(self, joint: GraphModule, min_cut: CutInTwo) -> tuple[GraphModule, GraphModule]:
            found[:] = min_cut(joint)
            return found[0], found[1]  # type: ignore[return-value]

        def emit(self, graph: GraphModule, generate: Generate, *, inference: bool) -> BoxedCallable:
            if inference:
                found[:] = (graph, None)
            return boxed(graph)

    with FakeTensorMode(), torch.enable_grad():
        fakes = [torch.empty(shape, dtype=dtype, device=device, requires_grad=wants) for shape, dtype, wants in inputs]
        drive_inductor(graph, fakes, Recorder(), settings)
    forward, backward = found
    assert forward is not None
    return forward, backward


def is_pointwise(node: Node) -> bool:
    """Whether each element of what a node makes comes from one element, or none, of what it reads."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def device_of(values: Sequence[Any]) -> torch.device:
    """Where a function of these values computes: where the largest tensor is; the CPU for what is on "meta"."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    largest = max(tensors, key=lambda value: value.numel(), default=None)
    return torch.device("cpu") if largest is None or largest.is_meta else largest.device


def random_state(values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state of the random number generators of the CPU and of the device that these are on."""
    cuda = next((value.device for value in values if value.is_cuda), None)
    return torch.get_rng_state(), None if cuda is None else torch.cuda.get_rng_state(cuda)


def set_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    """Put the generators of the CPU and of a device into a state that `random_state` gave."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of a device; those of other devices stay."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def from_random_state(state: tuple[torch.Tensor, torch.Tensor | None] | None) -> Iterator[None]:
    """Draw random numbers from a state on, and go on afterwards as if none had been drawn; None changes nothing."""
    if state is None:
        yield
        return
    device = torch.device("cpu" if state[1] is None else "cuda")
    before = random_state([torch.empty(0, device=device)])
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(before, device)


def called_with_leaves(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors and numbers, called with arguments that may be lists of them."""
    from torch.utils._pytree import tree_leaves

    def call(*arguments: Any) -> Any:
        return function(*tree_leaves(list(arguments)))

    return call


def refuse_autocast() -> None:
    """Raise where autocast is on: it would choose dtypes that a captured program does not show."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise NotImplementedError(
                f"torch.autocast is on for {device}, and a plan cuts programs whose dtypes it can see. Cast the model "
                f"instead, as in model.to(torch.bfloat16), or compile without a plan."
            )


class WrapperTensor(torch.Tensor):
    """A tensor that reports a shape and holds something else; what it does is up to its ``__torch_dispatch__``.

    Without slots, so that an ordinary tensor or parameter can become one.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def wrap(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, requires_grad: bool) -> Self:
        """A tensor without storage."""
        return torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=requires_grad
        )


def become(parameter: torch.nn.Parameter, other: WrapperTensor) -> None:
    """Make a parameter what `other` is: the same object for all that hold it, with hooks and attributes of its own."""
    attributes = {**parameter.__dict__, **other.__dict__, "_is_param": True}
    torch._C._swap_tensor_impl(parameter, other)
    parameter.__class__ = type(other)  # type: ignore[assignment]
    parameter.__dict__.clear()
    parameter.__dict__.update(attributes)


def take_over(parameter: torch.nn.Parameter, other: torch.nn.Parameter) -> None:
    """Give a parameter the memory, device and dtype of `other`: the same object for all that hold it."""
    torch._C._swap_tensor_impl(parameter, other)


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether hooks wait for the tensor's gradient."""
    return bool(tensor._backward_hooks) or bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


def is_elementwise(operator: Any) -> bool:
    """Whether each element of what an operator returns depends on the elements at its place alone."""
    draws = torch.Tag.nondeterministic_seeded in operator.tags
    returns_tensors = all(str(returned.type) == "Tensor" for returned in operator._schema.returns)  # unlike aten.equal
    return torch.Tag.pointwise in operator.tags and returns_tensors and not draws


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether dynamo is looking at shapes, and nothing is recorded that will run."""
    from torch._subclasses import FakeTensor

    recording = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return isinstance(tensor, FakeTensor) and not recording


def call_on_fakes(operator: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator with fake tensors of the shapes that wrappers report."""
    from torch._subclasses import FakeTensor
    from torch.utils._pytree import tree_leaves, tree_map

    inner = (getattr(value, "_local", value) for value in tree_leaves((args, kwargs)))
    mode = next(value.fake_mode for value in inner if isinstance(value, FakeTensor))

    def whole(value: Any) -> Any:
        return _fake_like(mode, value) if isinstance(value, WrapperTensor) else value

    return operator(*tree_map(whole, args), **tree_map(whole, kwargs))


def _fake_like(mode: Any, wrapper: WrapperTensor) -> torch.Tensor:
    with mode:
        return torch.empty(wrapper.shape, dtype=wrapper.dtype, device=wrapper.device)


def see_graphs(function: Callable[..., Any], see: Callable[[GraphModule, Sequence[Any]], None]) -> Callable[..., Any]:
    """A function whose graphs, when it is called, one gets to see, as torch.compile captures them.

    To be called once: what capturing leaves behind is not collected.
    """

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        see(gm, example_inputs)
        return gm.forward

    return _kept(torch.compile(function, backend=backend, dynamic=False))


def see_one_graph(
    function: Callable[..., Any], see: Callable[[GraphModule, Sequence[Any]], None]
) -> Callable[..., None]:
    """A function whose one graph, when it is called, one gets to see; nothing runs, and no guards are made.

    To be called once. The call raises what dynamo does for a function that is not one graph.
    """

    class Seen(Exception):
        pass

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        see(gm, example_inputs)
        raise Seen

    compiled = _kept(torch.compile(function, backend=backend, dynamic=False, fullgraph=True))

    def call(*arguments: Any, **keywords: Any) -> None:
        try:
            compiled(*arguments, **keywords)
        except torch._dynamo.exc.BackendCompilerFailed as failed:
            if not isinstance(failed.inner_exception, Seen):
                raise

    return call


def _kept(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that does not collect garbage after compiling."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        config = torch._dynamo.config
        with config.patch({"run_gc_after_compile": False} if hasattr(config, "run_gc_after_compile") else {}):
            return compiled(*arguments, **keywords)

    return call


def begin_together(begin: Sequence[Callable[[], Any]], group: Any, device: torch.device) -> list[Any]:
    """Begin collectives of one kind in a process group, with one call of its backend; what to wait for.

    These are all-reduces, or all-gathers or reduce-scatters to one tensor, and asynchronous. Where the backend cannot
    begin several of a device's tensors at once, as gloo those of a GPU, each is begun by itself.
    """
    from torch.distributed.distributed_c10d import _coalescing_manager, _world

    if len(begin) == 1 or not (device.type == "cpu" or group._get_backend(device).name() == "nccl"):
        return [one() for one in begin]
    try:
        with _coalescing_manager(group, async_ops=True) as together:
            for one in begin:
                one()
    except BaseException:
        _world.pg_coalesce_state.pop(group, None)  # or the group's next collective would wait for this block's end
        raise
    return list(together.works)


def timeout_of(group: Any) -> timedelta | None:
    """How long the collectives of a process group may take; None if its backend does not tell."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout: timedelta | None = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None
