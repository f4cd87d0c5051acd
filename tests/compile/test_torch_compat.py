"""Fails, by name, when a private torch API that the compiler half uses moves or changes."""

import importlib
import inspect
from typing import Any

import pytest
import torch

from torch_vtensor.compile import Compilation

REMEDY = f"moved in torch {torch.__version__}: adapt torch_vtensor/compile/_torch_compat.py"

CALLABLES = [
    ("torch._inductor.compile_fx", "compile_fx", ["inner_compile", "config_patches"]),
    ("torch._inductor.compile_fx", "compile_fx_inner", ["gm", "example_inputs"]),
    ("torch._inductor.compile_fx", "partition_fn", ["gm", "joint_inputs"]),
    ("torch._inductor.compile_fx", "_recursive_joint_graph_passes", ["gm"]),
    ("torch._inductor.custom_graph_pass", "CustomPartitionerFn", []),
    ("torch._inductor", "list_mode_options", ["mode"]),
    ("torch._inductor", "list_options", []),
    ("torch._inductor.cudagraph_trees", "reset_cudagraph_trees", []),
    ("torch.utils._pytree", "tree_leaves", ["tree"]),
    ("torch._ops", "OperatorBase", []),
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
    missing = [parameter for parameter in parameters if parameter not in inspect.signature(function).parameters]
    assert not missing, f"parameters {missing} of {module}.{name} {REMEDY}"


@pytest.mark.parametrize(("module", "name"), SETTINGS)
def test_settings_exist(module: str, name: str) -> None:
    config: Any = importlib.import_module(module)
    assert name in config.get_config_copy(), f"{module}.{name} {REMEDY}"


def test_nodes_carry_what_names_are_made_of(compiled: Any, compilations: list[Compilation]) -> None:
    compiled(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))(torch.ones(1, 2, requires_grad=True))
    assert compilations, f"torch._inductor.config.custom_partitioner_fn is not called any more; {REMEDY}"
    nodes = list(compilations[0].graph.module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    operators = [node for node in nodes if node.op == "call_function"]
    assert all("desc" in node.meta and hasattr(node.meta["desc"], "expr") for node in inputs), f"meta 'desc' {REMEDY}"
    assert "desc" in nodes[-1].meta, f"meta 'desc' of outputs {REMEDY}"
    assert any("nn_module_stack" in node.meta for node in operators), f"meta 'nn_module_stack' {REMEDY}"
    assert any("fwd_nn_module_stack" in node.meta for node in operators), f"meta 'fwd_nn_module_stack' {REMEDY}"
    tags = {str(node.meta.get("partitioner_tag")) for node in nodes}
    assert {"is_forward", "is_backward"} <= tags, f"meta 'partitioner_tag' {REMEDY}"


def test_dynamo_says_where_inputs_come_from(compiled: Any, compilations: list[Compilation]) -> None:
    model = torch.nn.Linear(2, 2)
    compiled(model)(torch.ones(1, 2))
    found = {value.name for value in compilations[0].graph.inputs if value.kind == "parameter"}
    assert found == {"weight", "bias"}, f"placeholder meta 'grapharg' or its source's name {REMEDY}"
