"""`python -m torch_vtensor`: the command line of a package that need not be on the PATH."""

from torch_vtensor.cli import main

if __name__ == "__main__":
    raise SystemExit(main(program="python -m torch_vtensor"))
