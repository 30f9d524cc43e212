# `make train` and `make test` work from a fresh clone: they make .venv, install the versions pinned in constraints.txt
# and build the C++ kernels. The stamps in .venv keep later calls from installing again.

PYTHON ?= python3
BUDGET ?= 11GB
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
CXX_FILES := $(wildcard kernels/*.h kernels/*/*.h kernels/*/*.cpp lofi_fast/memory/*.cpp)

.PHONY: train test check format report kernels-report clean distclean

train: $(VENV)/installed
	$(BIN)/python -m lofi_fast.train --mem-budget $(BUDGET) $(ARGS)

test: check
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/tested-with
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/tested-with
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# The version of CUDA whose DALI is installed: cuda13, or cuda12 for older cards and drivers (README.md).
CUDA ?= cuda13

# torch comes first: the kernels are built against its headers.
$(VENV)/build-tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel cmake ninja torch
	@touch $@

$(VENV)/installed: $(VENV)/build-tools pyproject.toml setup.py CMakeLists.txt $(CXX_FILES)
	$(PIP) --no-build-isolation --editable ".[$(CUDA)]"
	@$(BIN)/python -c "from lofi_fast.kernels import describe; print('kernels:', describe())"
	@touch $@

$(VENV)/tested-with: $(VENV)/installed
	$(PIP) pytest hypothesis ruff mypy clang-format import-linter
	@touch $@

report: $(VENV)/installed
	$(BIN)/python -m bench tables

kernels-report: $(VENV)/installed
	$(BIN)/python -m bench kernels

clean:
	rm -rf build dist lofi_fast.egg-info kernels/_native.so lofi_fast/memory/_cpu_allocator.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/installed $(VENV)/tested-with

distclean: clean
	rm -rf $(VENV)
