"""Ways to train a model on several GPUs: PyTorch's own, and plans. Each rank gets the whole batch and takes its part.

Legend of modes: a word of `STOCK` is PyTorch's; anything else is the plan of that name, or ``file.py:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from parallel_models import Llama, Subject
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NUM_MICROBATCHES = 8


class Trainer(NamedTuple):
    """``step()`` runs forward and backward passes and gives the loss of the whole batch, or on some ranks None.

    Gradients are those of the mean over the batch; ``parameters`` are what this rank has, by the model's names.
    """

    step: Callable[[], Tensor | None]
    parameters: dict[str, nn.Parameter]


def make_trainer(mode: str, subject: Subject, codegen: str, made: list[Any]) -> Trainer:
    """Prepare a model for a mode; ``made`` gets what a plan was compiled to.

    Raises:  ValueError for a mode that does not train this model.
    """
    if mode in STOCK:
        return STOCK[mode](subject, "inductor" if codegen == "inductor" else "aot_eager")
    options = {"plan": mode, "codegen": codegen, "inspect": made.append}
    loss_of = torch.compile(subject.loss_of, backend="superscaler", options=options, dynamic=False)

    def step() -> Tensor:
        loss = loss_of(*subject.arguments)
        loss.backward()
        return loss.detach()

    return Trainer(step, dict(subject.model.named_parameters()))


def fsdp2(subject: Subject, backend: str, *, checkpoints: bool = False, blocks: bool = False) -> Trainer:
    """Shard every layer with `fully_shard`, gathered anew for backward; compile the function, or each layer."""
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(subject)
    if checkpoints:
        checkpoint_layers(subject.model, subject.layers)
    for layer in _layers(subject):
        if blocks:
            layer.compile(backend=backend)
        fully_shard(layer, mesh=mesh)
    fully_shard(subject.model, mesh=mesh)
    rows = [value.chunk(dist.get_world_size())[dist.get_rank()] for value in subject.arguments]
    loss = torch.compile(subject.loss, backend=backend)
    compiled = torch.compile(subject.loss_of, backend=backend)

    def step() -> Tensor:
        mine = loss(subject.outputs(*rows[:-1]), rows[-1]) if blocks else compiled(*rows)
        mine.backward()
        return _mean_over_ranks(mine.detach())

    return Trainer(step, _named(subject.model))


def dtensor_tp(subject: Subject, backend: str, *, sequence: bool = False) -> Trainer:
    """Cut heads, hidden features and vocabulary with `parallelize_module`, or the sequence between as well."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    _only_llama("dtensor_tp", subject)
    mesh, between = _mesh(subject), Shard(1) if sequence else Replicate()
    column, row = ColwiseParallel(), RowwiseParallel(output_layouts=between)
    of_layer: dict[str, Any] = {f"self_attn.{name}_proj": column for name in "qkv"}
    of_layer |= {"self_attn.o_proj": row, "mlp.gate_proj": column, "mlp.up_proj": column, "mlp.down_proj": row}
    whole: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        gather = {"hidden_states": Shard(1)}, {"hidden_states": Replicate()}
        of_layer |= {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts=gather[0], desired_input_kwarg_layouts=gather[1], use_local_output=True
            ),
            "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        }
        whole["norm"] = SequenceParallel()
    for layer in _layers(subject):
        parallelize_module(layer, mesh, of_layer)
        layer.compile(backend=backend)
    model = parallelize_module(subject.model, mesh, whole)
    # A compiled layer that is given a tensor still on its way loses the gradient's DTensor.
    model.embed.register_forward_hook(lambda module, given, made: made if type(made) is Tensor else made.clone())

    def step() -> Tensor:
        *inputs, labels = subject.arguments
        logits = subject.outputs(*inputs)
        with loss_parallel():
            loss = subject.loss(logits, labels)
            loss.backward()
        found = loss.detach()
        return found.full_tensor() if hasattr(found, "full_tensor") else found

    return Trainer(step, _named(subject.model))


def pipelining(subject: Subject, backend: str) -> Trainer:
    """1F1B of torch.distributed.pipelining over stages of as many layers each, which are compiled."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model = _only_llama("pipelining", subject)
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens, labels = subject.arguments
    size = len(tokens) // NUM_MICROBATCHES
    width, vocabulary = model.layers["0"].hidden_size, model.head.out_features  # type: ignore[union-attr]
    model.keep_stage(rank, world)
    model.compile(backend=backend)
    like = partial(torch.empty, device="meta", dtype=next(model.parameters()).dtype)
    between = like(size, tokens.shape[1], width).requires_grad_()
    stage = PipelineStage(
        model,
        rank,
        world,
        tokens.device,
        input_args=(tokens[:size].to("meta"),) if rank == 0 else (between,),
        output_args=(like(size, tokens.shape[1], vocabulary).requires_grad_(),) if rank == world - 1 else (between,),
    )
    loss = torch.compile(subject.loss, backend=backend)
    schedule = Schedule1F1B(stage, NUM_MICROBATCHES, loss_fn=loss)

    def step() -> Tensor | None:
        losses: list[Tensor] = []
        given = (tokens,) if rank == 0 else ()
        asked = {"target": labels, "losses": losses} if rank == world - 1 else {}
        schedule.step(*given, **asked)
        return torch.stack(losses).mean().detach() if losses else None

    return Trainer(step, _named(model))


STOCK: dict[str, Callable[[Subject, str], Trainer]] = {
    "fsdp2": fsdp2,
    "fsdp2_blocks": partial(fsdp2, blocks=True),
    "fsdp2_checkpoint": partial(fsdp2, checkpoints=True),
    "dtensor_tp": dtensor_tp,
    "dtensor_sp": partial(dtensor_tp, sequence=True),
    "pipelining_1f1b": pipelining,
}


def checkpoint_layers(model: nn.Module, layers: tuple[type[nn.Module], ...]) -> None:
    """Recompute every layer in backward, as torch's own wrapper does."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layers))


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def _layers(subject: Subject) -> Iterable[nn.Module]:
    return [module for module in subject.model.modules() if isinstance(module, subject.layers)]


def _mesh(subject: Subject) -> DeviceMesh:
    return init_device_mesh(subject.arguments[0].device.type, (dist.get_world_size(),))


def _only_llama(mode: str, subject: Subject) -> Llama:
    if not isinstance(subject.model, Llama):
        raise ValueError(f"{mode} is written for llama alone")
    return subject.model


def _mean_over_ranks(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
