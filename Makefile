# `make train` and `make test` work from a fresh clone: they make .venv, install the versions pinned in constraints.txt
# and build the C++ kernels. The stamps in .venv keep later calls from installing again.

PYTHON ?= python3
BUDGET ?= 11GB
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
CXX_FILES := $(wildcard kernels/*.h kernels/*/*.h kernels/*/*.cpp lofi_fast/memory/*.cpp)
STUBS := $(wildcard tests/null_gpu/*.[ch] tests/null_gpu/*.cpp)

.PHONY: train test check format dist null-gpu report kernels-report clean distclean

train: $(VENV)/installed
	$(BIN)/python -m lofi_fast.train --mem-budget $(BUDGET) $(ARGS)

# A test that hangs for 20 minutes ends its process, with the stacks of its threads; the others go on without it.
test: check
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal \
		-o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true $(ARGS)

check: $(VENV)/tested-with
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) $(STUBS)

format: $(VENV)/tested-with
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES) $(STUBS)

# The source distribution, and from that the wheel, whose kernels serve torch 2.11 and later on this platform.
dist: $(VENV)/tested-with
	$(BIN)/python -m build --no-isolation

# The version of CUDA whose DALI is installed: cuda13, or cuda12 for older cards and drivers (README.md).
CUDA ?= cuda13

# torch comes first: the kernels are built against its headers.
$(VENV)/build-tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel cmake ninja torch
	@touch $@

$(VENV)/installed: $(VENV)/build-tools pyproject.toml setup.py build_backend.py CMakeLists.txt $(CXX_FILES)
	$(PIP) --no-build-isolation --editable ".[$(CUDA)]"
	@$(BIN)/python -c "from lofi_fast.kernels import describe; print('kernels:', describe())"
	@touch $@

$(VENV)/tested-with: $(VENV)/installed
	$(PIP) pytest pytest-xdist hypothesis ruff mypy clang-format import-linter build tensorboard
	@touch $@

# The CUDA path without a card (tests/null_gpu/conftest.py says how). It needs the CUDA build of torch, some 3 GB, in an
# environment of its own; NULL_GPU_VENV names one that is there already.
NULL_GPU_VENV ?= .venv-cuda
NULL_GPU_BUILD := $(abspath build/null_gpu)

.venv-cuda/made: tests/null_gpu/requirements.txt
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --disable-pip-version-check --requirement $<
	@touch $@

null-gpu: $(if $(filter .venv-cuda,$(NULL_GPU_VENV)),.venv-cuda/made)
	$(MAKE) -C tests/null_gpu PYTHON=$(abspath $(NULL_GPU_VENV))/bin/python BUILD=$(NULL_GPU_BUILD)
	NULL_GPU=$(NULL_GPU_BUILD) $(NULL_GPU_VENV)/bin/python -m pytest tests/null_gpu $(ARGS)

report: $(VENV)/installed
	$(BIN)/python -m bench tables

kernels-report: $(VENV)/installed
	$(BIN)/python -m bench kernels

clean:
	rm -rf build dist lofi_fast.egg-info kernels/_native.so lofi_fast/memory/_cpu_allocator.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/installed $(VENV)/tested-with

distclean: clean
	rm -rf $(VENV) .venv-cuda
