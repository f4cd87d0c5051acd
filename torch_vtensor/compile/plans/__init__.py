"""Ready plans, one a file, each a function that `options={"plan": …}` takes."""

from torch_vtensor.compile.plans.single_device import single_device

__all__ = ["single_device"]
