"""stats(), metrics(), trim() and empty_cache() in a process that has no transformers, as users of VTensor alone do."""

from collections.abc import Callable

PROGRAM = """
import sys
sys.modules["transformers"] = None  # an import of it raises ModuleNotFoundError

import torch
import torch_vtensor

assert torch_vtensor.trim() == 0, "nothing was allocated yet"
assert str(torch_vtensor.stats()) == "nothing was allocated yet"

page = torch.ones(4, 65536, dtype=torch.uint8)
vtensor = torch_vtensor.VTensor((65536,), capacity=64, dtype=torch.uint8)
vtensor.append(page)
found = torch_vtensor.stats()
held = found.devices[torch.device("cpu")]
assert held.live_bytes == page.nbytes, held
assert (found.appends, found.attention, found.prefixes, found.serving) == ({}, {}, {}, {})
assert "live 256 KiB" in str(found)
assert f'torch_vtensor_live_bytes{{device="cpu"}} {page.nbytes}' in torch_vtensor.metrics()

vtensor.close()
print(torch_vtensor.trim("cpu"))
vtensor = torch_vtensor.VTensor((65536,), capacity=64, dtype=torch.uint8)
vtensor.append(page)
vtensor.close()
torch_vtensor.empty_cache()
assert torch_vtensor.stats().devices[torch.device("cpu")].committed_bytes == 0

try:
    torch_vtensor.enable
except ModuleNotFoundError as error:
    assert "transformers" in str(error)
else:
    raise AssertionError("transformers could be imported")
"""


def test_memory_is_reported_and_given_back_without_transformers(run_python: Callable[..., str]) -> None:
    assert int(run_python(PROGRAM)) >= 4 * 65536
