# make demo and make test need Python >= 3.11, a C compiler and nothing else: they make .venv when it is not there.
#
#   PYTHON=python3.12        the Python to make .venv from; if it has a supported torch, its packages are reused
#   TORCH=torch==2.15.0      the torch to install in .venv instead
#   PYTEST="-x -k settings"  more arguments for pytest

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PYTHON := $(or $(PYTHON),python3)
endif

VENV := .venv
RUN := $(VENV)/bin/python -m
NATIVE := torch_vtensor/allocator/native
BUILT_FROM := pyproject.toml tools/make_venv.py $(NATIVE)/CMakeLists.txt $(wildcard $(NATIVE)/*.c $(NATIVE)/*.h)
MAKE_VENV = $(PYTHON) tools/make_venv.py $(VENV)$(if $(TORCH), --torch '$(TORCH)')
# Another PYTHON or TORCH is another file, so that naming one has an effect on an environment that is already there.
READY := $(VENV)/.ready-$(subst /,-,$(PYTHON)$(TORCH))

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint format clean

help: ## show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## train, save, load, generate and branch, against the stock caches; under two minutes on two cores
	$(RUN) torch_vtensor demo

test: $(READY) ## run the tests that this machine can run; PYTEST="-m slow" runs the long ones
	$(RUN) pytest -n auto --dist loadgroup -m "not slow" $(PYTEST)

test-gpu: $(READY) ## run the tests that need a CUDA GPU
	$(RUN) pytest -m gpu $(PYTEST)

lint: $(READY)-to-lint ## check style, format and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

format: $(READY)-to-lint ## format the code and fix what can be fixed
	$(RUN) ruff check --fix
	$(RUN) ruff format

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew when what it is built from changes; Python files are used from the source tree and need nothing.
$(READY): $(BUILT_FROM)
	@rm -f $(VENV)/.ready*
	$(MAKE_VENV) --extras demo,test --wanted serving
	@touch $@

$(READY)-to-lint: $(READY)
	$(MAKE_VENV) --extras dev
	@touch $@
