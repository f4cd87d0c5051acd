"""VTensor itself: a tensor that reserves addresses for its whole length and takes memory as it grows.

Look at: the address stays while memory is added; a fork shares whole pages and copies only the last, partly filled one;
a view outlives close().
"""

import torch

from torch_vtensor import VTensor, stats

device = "cuda" if torch.cuda.is_available() else "cpu"


def rows(count: int, value: float) -> torch.Tensor:
    """``count`` rows [count, 8, 64] of one value."""
    return torch.full((count, 8, 64), value, device=device)


with VTensor((8, 64), capacity=1_000_000, device=device) as history:
    print(f"reserved {history.reserved_bytes:,} bytes of addresses, committed {history.committed_bytes}")

    address = history.append(rows(5000, 1.0)).data_ptr()
    view = history.append(rows(5000, 2.0))
    print(f"{history}\n    same address after growth: {view.data_ptr() == address == history.data_ptr}")
    print(f"    an ordinary tensor: shape {tuple(view.shape)}, sum {view.sum().item():,.0f}")

    branch = history.fork()
    print(f"fork: {branch.shared_bytes:,} of {branch.committed_bytes:,} bytes are shared, not copied")
    branch.truncate(5000)
    branch.append(rows(1, 9.0))
    values = [each.tensor()[5000, 0, 0].item() for each in (branch, history)]
    print(f"after a write to the branch, row 5000 is {values[0]:.0f} there and {values[1]:.0f} in the original")
    branch.close()

print(f"after close() the view still reads {view[0, 0, 0]:.0f} … {view[-1, 0, 0]:.0f}")
print(stats())
