# Everything here needs no more than Python >= 3.10, < 3.15, and a package index.
# `make PYTHON=python3.12 test` chooses the interpreter for a new environment.

PYTHON ?= python3
VENV := .venv
VENV_MIN := .venv-min

# Passed on to the demo and to pytest: make demo DEMO_ARGS="--quick"
DEMO_ARGS ?=
# A file's tests share what its fixtures train; conftest.py has the order of the files
TEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# For `make record`: names in benchmarks/recorded
RECORD ?= $(basename $(notdir $(wildcard benchmarks/recorded/*.txt)))

# SAEBench needs numpy < 2, which has no wheels for Python 3.13; with a compiler at hand
# `make EXTRAS=bench,test` builds it there. Without it, the tests that need it are left out.
EXTRAS ?= $(shell $(PYTHON) -c 'import sys; print("bench,test" if sys.version_info < (3, 13) else "test")')

# The Python of the machine with the GPU, for which `make gpu-wheels` downloads
GPU_PYTHON ?= 3.12
GPU_WHEELS := .gpu-wheels

.PHONY: help demo test test-min lint docs docs-check record gpu-wheels gpu-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s%s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## Train scaffold SAEs and their plain twins, and compare (DEMO_ARGS=...)
	$(VENV)/bin/saelens-scaffold demo $(DEMO_ARGS)

test: $(VENV)/.installed ## Run the tests; installs Chromium if there is none (TEST_ARGS=...)
	@$(VENV)/bin/python tests/chromium.py
	$(VENV)/bin/python -m pytest $(TEST_ARGS)

test-min: $(VENV_MIN)/.installed ## Run the tests against the lowest versions declared
	@$(VENV_MIN)/bin/python tests/chromium.py
	$(VENV_MIN)/bin/python -m pytest $(TEST_ARGS)

lint: $(VENV)/.installed ## Check style, format, types and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports

docs: $(VENV)/.installed-docs ## Build the documentation's site, checking its links
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

docs-check: $(VENV)/.installed ## Find numbers in README and docs that no recorded run contains
	$(VENV)/bin/python tests/docs_check.py

record: $(VENV)/.installed ## Run recorded commands again, hours in all (RECORD="name ...")
	for name in $(RECORD); do PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python benchmarks/record.py $$name || exit 1; done

gpu-wheels: $(VENV)/.installed ## Download what `make gpu-check` needs beside PyTorch (GPU_PYTHON=3.12)
	rm -rf $(GPU_WHEELS)
	$(VENV)/bin/python -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) \
	  $(foreach glibc,2_28 2_27 2_17,--platform manylinux_$(glibc)_x86_64) --platform manylinux2014_x86_64 \
	  -c constraints.txt -r benchmarks/gpu_wheels.txt -d $(GPU_WHEELS)
	@du -sh $(GPU_WHEELS)

gpu-check: ## Test and time the kernels on a CUDA GPU, with its python3 and no network, in 9 minutes (GPU_ARGS=...)
	$(PYTHON) benchmarks/gpu_check.py --wheels $(GPU_WHEELS) $(GPU_ARGS)

clean: ## Remove the environments and all that the tools leave behind
	rm -rf $(VENV) $(VENV_MIN) $(GPU_WHEELS) $(VENV)-dashboard* $(VENV_MIN)-dashboard* build dist site .cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(call create_venv,$(VENV))
	@echo "Installing saelens-scaffold[$(EXTRAS)] into $(VENV): several GB, and minutes, with PyTorch"
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV_MIN)/.installed: pyproject.toml constraints-min.txt
	@$(call create_venv,$(VENV_MIN))
	@echo "Installing saelens-scaffold[$(EXTRAS)] in its lowest versions into $(VENV_MIN)"
	$(VENV_MIN)/bin/python -m pip install -q -c constraints-min.txt -e '.[$(EXTRAS)]'
	@touch $@

# Debian's python3 comes without ensurepip, hence without a usable venv module.
define create_venv
{ test -x $(1)/bin/python && test -x $(1)/bin/pip; } || { \
  $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' \
    || { echo "$(PYTHON) is missing, or not a Python >= 3.10, < 3.15: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }; \
  $(PYTHON) -m venv $(1) \
    || $(PYTHON) -m virtualenv -q $(1) \
    || { echo "$(PYTHON) cannot create a virtual environment. Install its venv module (Debian, Ubuntu: apt install python3-venv) or virtualenv, or choose another interpreter: make PYTHON=..." >&2; exit 1; }; \
}
endef
