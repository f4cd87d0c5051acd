"""What a backward pass takes for its own of what forward saved."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from virtual import capture_call

from torch_vtensor.compile import Mesh
from torch_vtensor.compile.backend import compile_plan
from torch_vtensor.compile.codegen import CodeGenerator
from torch_vtensor.compile.plans import named


class Layer(nn.Module):
    """What tanh makes leaves and is needed by backward; so is what silu reads, which stays inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 20, bias=False), nn.Linear(20, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(F.silu(self.up(x))))


def test_a_backward_pass_takes_what_nobody_else_has() -> None:
    model = nn.ModuleList(Layer() for _ in range(3)).double()

    def loss_of(x: Tensor) -> Tensor:
        for layer in model:
            x = layer(x)
        return x.sum()

    plan = named("zero3", 2)
    call = capture_call(loss_of, torch.randn(4, 6, dtype=torch.double))
    compilation = compile_plan(call.captured, plan, Mesh((0, 1), plan.axes), trains=True)
    segment = next(one for one in compilation.program.segments if one.rank == 0 and len(one.reads_again) == 2)
    code = CodeGenerator("eager", {})(segment)
    inputs = [torch.randn(arrival.mask.shape, dtype=torch.double) for arrival in segment.arrivals]
    (departure,), (saved,) = code.forward(inputs)
    before = dict(saved.values)
    others = {tensor.data_ptr() for tensor in (departure, *inputs)}
    assert {value.data_ptr() in others for value in before.values()} == {False, True}
    again = [value if number in segment.reads_again else None for number, value in enumerate(inputs)]
    code.backward("B", [saved], again, [torch.ones_like(departure)])
    assert all(value.data_ptr() in others for value in saved.values.values())
    assert saved.values.keys() == {name for name, value in before.items() if value.data_ptr() in others}
