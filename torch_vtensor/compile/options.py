"""What `torch.compile(..., backend="superscaler", mode=..., options=...)` accepts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch_vtensor import __version__
from torch_vtensor.compile import _torch_compat
from torch_vtensor.compile.primitives import PlanFunction
from torch_vtensor.settings import parse_bytes

if TYPE_CHECKING:
    from torch_vtensor.compile.backend import Compilation
    from torch_vtensor.compile.uncut import Uncut

CodeGenerator = Literal["inductor", "eager"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one compilation; each field is an option of that name."""

    plan: PlanFunction | str | None = None
    """What is cut, where it runs and when: a function of (Graph, Mesh) that calls primitives, the name of a ready plan
    as in ``"dp2+tp2+1f1b/8"``, or ``"file.py:function"``. None: nothing is cut, and inductor compiles the graph whole,
    on this device."""

    memory_budget: int | float | None = None
    """The most bytes that a step may hold on one device, also given as text such as "20GiB": parameters, gradients,
    activations; or, as a float up to 1.0, a share of what it would hold uncut. The compiler finds pieces and
    recomputation that fit at the least extra time, changes nothing where nothing has to be, and refuses a budget that
    it cannot meet. With a plan: that plan has to fit."""

    mesh: Mapping[str, int] | None = None
    """Names and sizes of the mesh's axes, for instance ``{"pp": 2, "tp": 4}``; the last runs fastest over the ranks. A
    plan given by name knows its own."""

    codegen: CodeGenerator = "inductor"
    """Who generates kernels. "eager" runs the same segments operator by operator, with eager's random numbers: it needs
    no C++ compiler and no time, and tells whether a wrong result comes from the plan or from the generated code."""

    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's own settings, as `torch.compile(options=...)` takes them for its own backend."""

    inspect: Callable[[Compilation | Uncut], None] | None = None
    """Called with what every phase made, once for each captured graph, before kernels are generated."""

    def __post_init__(self) -> None:
        """Refuse values that no phase could honour."""
        if self.plan is not None and not isinstance(self.plan, str) and not callable(self.plan):
            raise TypeError(
                f"plan is {self.plan!r}; a plan is a function of (graph, mesh), a name such as 'dp2+tp2', or "
                f"'file.py:function'."
            )
        if self.codegen not in get_args(CodeGenerator):
            raise ValueError(f"codegen is {self.codegen!r}; choose one of {', '.join(get_args(CodeGenerator))}.")
        if not isinstance(self.inductor, Mapping):
            raise TypeError(f"inductor is {self.inductor!r}; give a dict of inductor's settings.")
        if self.inductor:
            _refuse_unknown("options['inductor']", self.inductor, _torch_compat.inductor_option_names())
        if self.inspect is not None and not callable(self.inspect):
            raise TypeError(f"inspect is {self.inspect!r}; give a function of one Compilation.")

    @property
    def config_patches(self) -> dict[str, Any]:
        """What to change in inductor's settings."""
        if self.codegen == "eager":
            # Inductor's passes and random numbers are made for its code generator.
            return {**self.inductor, "use_joint_graph_passes": False, "fallback_random": True}
        return dict(self.inductor)

    @property
    def cache_key(self) -> str | None:
        """Names what the phases do where that is the same in every process, None where they must be run to know."""
        asks_nothing = self.plan is None and self.codegen == "inductor" and self.inspect is None
        return f"torch_vtensor {__version__} uncut" if asks_nothing else None


def read_memory_budget(given: int | float | str | None) -> int | float | None:
    """The option `memory_budget`, given in bytes, as text, or as a share.

    Raises:  ValueError for what is none of them.
    """
    budget = given
    if isinstance(given, str):
        try:
            budget = parse_bytes(given)
        except ValueError as error:
            raise ValueError(f"memory_budget: {error}") from None
    if budget is not None and (
        isinstance(budget, bool)
        or not isinstance(budget, int | float)
        or budget <= 0
        or (isinstance(budget, float) and budget > 1)
    ):
        raise ValueError(
            f"memory_budget is {given!r}; give a number of bytes (an int, or a text such as '20GiB'), or a share of "
            f"what the step takes uncut (a float up to 1.0)."
        )
    return budget


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Read what the user gave torch.compile.

    Raises:  ValueError or TypeError for an option that does not exist or a value that it cannot have; RuntimeError for
             an unknown mode.
    """
    given = dict(options or {})
    _refuse_unknown("options", given, [known.name for known in fields(Options)])
    if mode is not None:
        given["inductor"] = {**_torch_compat.mode_options(mode), **given.get("inductor", {})}
    if "memory_budget" in given:
        given["memory_budget"] = read_memory_budget(given["memory_budget"])
    return Options(**given)


def _refuse_unknown(what: str, given: Iterable[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            closest = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {closest[0]!r}?" if closest else ""
            listed = f" Known: {', '.join(sorted(known))}." if len(known) < 20 else ""
            raise ValueError(f"{what} has no {name!r}.{hint}{listed}")
