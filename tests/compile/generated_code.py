"""Inductor's generated code, run without kernels: which memory it has at a time, whatever would be computed in it.

The code that calls kernels is inductor's own. Kernels are neither compiled nor run, and tensors have no memory: what is
counted is what the code allocates, reuses and lets go.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._functorch import config as aot_config
from torch._inductor import async_compile, config
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Held:
    """The most bytes at once, and the bytes at the end.

    ``own`` has the names of outputs with memory of their own, which no input and no output before has; ``of_inputs`` of
    those that have an input's.
    """

    most: int
    end: int
    own: tuple[str, ...]
    of_inputs: tuple[str, ...]


@dataclass(frozen=True)
class Generated:
    """Code for one graph: ``reads`` are the names of its inputs, ``makes`` of its outputs, None for what is none."""

    code: str
    reads: Sequence[str]
    makes: Sequence[str | None]
    examples: Sequence[torch.Tensor]

    def run(self, freed: Sequence[str] = ()) -> Held:
        """Run it. Inputs are there to the end but for those that can be `freed`, which count like what is made."""
        namespace: dict[str, Any] = {"__name__": "generated"}
        with patch.object(async_compile, "AsyncCompile", _Nothing):
            exec(self.code, namespace)
        namespace["empty_strided_cpu"] = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
        namespace["reinterpret_tensor"] = torch.as_strided
        namespace["assert_size_stride"] = namespace["assert_alignment"] = _nothing
        call = namespace.get("call") or namespace["Runner"]([]).call
        with FakeTensorMode(), _Bytes() as held:
            inputs = [torch.empty_strided(e.shape, e.stride(), dtype=e.dtype) for e in self.examples]
            others = [one.untyped_storage() for name, one in zip(self.reads, inputs, strict=True) if name not in freed]
            base = sum(storage.nbytes() for storage in others)
            entered = {storage._cdata for storage in others}
            known = set(entered)
            held.most = held.now
            own, of_inputs = [], []
            for name, value in zip(self.makes, made := call(inputs), strict=True):
                if name is not None:
                    storage = value.untyped_storage()._cdata
                    of_inputs += [name] * (storage in entered)
                    own += [name] * (storage not in known)
                    known.add(storage)
            found = Held(held.most - base, held.now - base, tuple(own), tuple(of_inputs))
            del made, value
        return found


@contextlib.contextmanager
def generated(codes: list[Generated]) -> Iterator[None]:
    """Have inductor generate code for each graph that it compiles, keep that, and make it nothing that runs."""

    def keep(lowering: GraphLowering) -> Any:
        code = lowering.codegen()[0]
        (output,) = lowering.orig_gm.graph.find_nodes(op="output")
        makes = [getattr(node, "name", None) for node in output.args[0]]
        codes.append(
            Generated(getattr(code, "value", code), lowering.graph_input_names, makes, lowering.example_inputs)
        )
        return SimpleNamespace(call=_nothing, __file__="", key="")

    # Backward is generated when forward is, not when it first runs: nothing runs.
    at_once = aot_config.patch(force_non_lazy_backward_lowering=True)
    with patch.object(GraphLowering, "compile_to_module", keep), config.patch(fx_graph_cache=False), at_once:
        yield


class _Bytes(TorchDispatchMode):
    """Counts the bytes of tensors that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self._known:
                self._add(value.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.remove(key)
        self.now -= num_bytes


class _Nothing:
    """Whatever compiles and is a kernel: takes everything, and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _nothing


def _nothing(*_: Any, **__: Any) -> Any:
    return _nothing
