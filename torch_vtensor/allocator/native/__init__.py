"""Where the compiled shared object lies, in a wheel as in an editable install."""

from pathlib import Path

LIBRARY_NAME = "libvtensor_pool.so"


def library_path() -> Path:
    """Return the file to hand to ctypes or to torch's CUDAPluggableAllocator.

    Raises:  FileNotFoundError if the package was imported from a source tree that was never built.
    """
    # An editable install keeps the Python files in the source tree and the built file in site-packages: two folders,
    # one package, both on __path__.
    for folder in __path__:
        candidate = Path(folder) / LIBRARY_NAME
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{LIBRARY_NAME} is in none of {list(__path__)}: it is built when torch_vtensor is installed. "
        "Run `pip install -e .` (or `make test`) in the source tree; a C compiler is all it needs."
    )
