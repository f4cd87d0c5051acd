"""Compiling CUDA C at run time with NVRTC, which every CUDA build of torch brings; no toolkit is needed."""

from __future__ import annotations

__all__ = ["compile_cubin", "nvrtc_version"]


def nvrtc_version() -> str:
    """The version of the NVRTC that is used.

    Raises: ImportError without cuda-python; RuntimeError without NVRTC.
    """
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def compile_cubin(source: bytes, name: str, capability: tuple[int, int]) -> bytes:
    """Machine code of ``source`` for devices of this compute capability. Lets go of the GIL while it compiles.

    Raises: ImportError without cuda-python; RuntimeError without NVRTC, or with what it says about the source.
    """
    from cuda.bindings import nvrtc

    error, program = nvrtc.nvrtcCreateProgram(source, name.encode(), 0, [], [])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcCreateProgram failed with {error.name}")
    try:
        # For this device alone: a driver older than NVRTC refuses PTX, which it would have to compile, but runs code.
        options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            said = log.rstrip(b"\0\n").decode(errors="replace")
            raise RuntimeError(f"nvrtcCompileProgram with {options[0].decode()}: {error.name}: {said}")
        cubin = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)
