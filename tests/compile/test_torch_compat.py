"""Fails, by name, when a private torch API that the compiler half uses moves or changes."""

import copy
import importlib
import inspect
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from virtual import capture_call

from torch_vtensor.compile import Uncut
from torch_vtensor.compile._torch_compat import (
    generate_with_inductor,
    has_hooks,
    is_elementwise,
)

REMEDY = f"moved in torch {torch.__version__}: adapt torch_vtensor/compile/_torch_compat.py"

CALLABLES = [
    (
        "torch._functorch.aot_autograd",
        "aot_export_module",
        ["mod", "args", "decompositions", "trace_joint", "pre_dispatch"],
    ),
    ("torch._inductor.compile_fx", "compile_fx", ["inner_compile", "config_patches"]),
    ("torch._inductor.compile_fx", "compile_fx_inner", ["gm", "example_inputs"]),
    ("torch._inductor.compile_fx", "partition_fn", ["gm", "joint_inputs"]),
    ("torch._inductor.compile_fx", "_recursive_joint_graph_passes", ["gm"]),
    ("torch._inductor.decomposition", "select_decomp_table", []),
    ("torch._dispatch.python", "enable_python_dispatcher", []),
    ("torch.fx.experimental.proxy_tensor", "make_fx", ["decomposition_table"]),
    ("torch.func", "functionalize", ["remove"]),
    ("torch._inductor.custom_graph_pass", "CustomPartitionerFn", []),
    ("torch._inductor", "list_mode_options", ["mode"]),
    ("torch._inductor", "list_options", []),
    ("torch._inductor.cudagraph_trees", "reset_cudagraph_trees", []),
    ("torch.utils._pytree", "tree_leaves", ["tree"]),
    ("torch._ops", "OperatorBase", []),
    ("torch.distributed.distributed_c10d", "_coalescing_manager", ["group", "async_ops"]),
    ("torch._C", "_swap_tensor_impl", []),
    ("torch._C", "_disabled_torch_function_impl", []),
    ("torch._C", "_get_dispatch_mode", []),
]
SETTINGS = [
    ("torch._inductor.config", "custom_partitioner_fn"),
    ("torch._inductor.config", "use_joint_graph_passes"),
    ("torch._inductor.config", "fallback_random"),
    ("torch._functorch.config", "enable_autograd_cache"),
    ("torch._functorch.config", "enable_remote_autograd_cache"),
]


@pytest.mark.parametrize(("module", "name", "parameters"), CALLABLES)
def test_functions_take_what_we_give_them(module: str, name: str, parameters: list[str]) -> None:
    function = getattr(importlib.import_module(module), name, None)
    assert function is not None, f"{module}.{name} {REMEDY}"
    if not parameters:
        return  # some functions of the C library have no signature
    missing = [parameter for parameter in parameters if parameter not in inspect.signature(function).parameters]
    assert not missing, f"parameters {missing} of {module}.{name} {REMEDY}"


@pytest.mark.parametrize(("module", "name"), SETTINGS)
def test_settings_exist(module: str, name: str) -> None:
    config: Any = importlib.import_module(module)
    assert name in config.get_config_copy(), f"{module}.{name} {REMEDY}"


def test_nodes_and_inputs_carry_what_names_are_made_of() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    graph = capture_call(lambda x: model(x).sum(), torch.ones(1, 2)).captured.graph
    names = {tensor.name for tensor in graph.inputs if tensor.kind == "parameter"}
    assert names == {"0.weight", "0.bias"}, f"placeholder meta 'grapharg' or its source's name {REMEDY}"
    assert {operator.module for operator in graph.operators} == {"0", "1", ""}, f"meta 'nn_module_stack' {REMEDY}"


def test_joint_graphs_tell_nested_regions_by_their_descriptors(compiled: Any, compilations: list[Uncut]) -> None:
    compiled(torch.nn.Linear(2, 2))(torch.ones(1, 2))
    assert compilations, f"custom_partitioner_fn is not called any more, or meta 'desc' of inputs is gone; {REMEDY}"
    assert compilations[0].is_joint


def test_hooks_of_a_gradient_can_be_seen() -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        parameter = torch.nn.Parameter(torch.ones(2))
        assert not has_hooks(parameter)
        getattr(parameter, register)(lambda _: None)
        assert has_hooks(parameter), f"the hooks of {register} {REMEDY}"


@pytest.mark.parametrize(
    ("name", "expected"), [("add.Tensor", True), ("lerp_.Scalar", True), ("equal", False), ("bernoulli", False)]
)
def test_operators_are_tagged_as_elementwise(name: str, expected: bool) -> None:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    assert is_elementwise(operator) == expected, f"the tags of {operator} {REMEDY}"


@pytest.mark.slow
def test_inductor_writes_over_what_is_donated_and_nothing_else() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ops.aten.mul.Tensor(x, 2), torch.ops.aten.add.Tensor(y, 1)]

    with FakeTensorMode():
        like = [torch.empty(64, 64) for _ in range(2)]
        graph = make_fx(function)(*like)
    for donated in ([], [0]):
        x, y = torch.ones(64, 64), torch.ones(64, 64)
        places = x.data_ptr(), y.data_ptr()
        code = generate_with_inductor(copy.deepcopy(graph), [x, y], {}, donated)
        given = [x, y]
        doubled, more = code(given)
        assert not given, "the caller keeps nothing"
        assert (doubled.data_ptr() == places[0]) == bool(donated)
        assert more.data_ptr() not in places
        assert (doubled == 2).all()
        assert (more == 2).all()
        assert (y == 1).all()
