"""`torch.compile(model, backend="superscaler")`: found by its name, torch_vtensor is not imported.

Look at: an ordinary training loop around an ordinary module. Without a plan nothing is cut; `inspect` tells what was
compiled, and train_with_a_plan.py does the rest.
"""

import torch
from torch import nn

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
compilations = []


def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The function to compile: model and loss together."""
    return nn.functional.mse_loss(model(inputs), targets)


# codegen="eager" runs the pieces operator by operator and needs no C++ compiler; without it, inductor makes kernels.
options = {"codegen": "eager", "inspect": compilations.append}
step = torch.compile(loss_of, backend="superscaler", options=options)
inputs = torch.randn(256, 16, device=device)
targets = inputs.square().sum(1, keepdim=True)
for number in range(101):
    loss = step(inputs, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if number % 25 == 0:
        print(f"step {number:>3}  loss {loss.item():.4f}")

print(f"\n{len(compilations)} graph compiled: {compilations[0]}")
