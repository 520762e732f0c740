# make demo: complete a prompt with a real model.  make test: every check.  Both need only Python 3.11+, make and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= The three primary colors are
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard tokenspeed/kernels/cpu/src/*)
# Two workers share the machine, one thread each: more threads than cores slow every test down. One that has nothing left
# takes tests from the other.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=15
CROSS_PACKAGES := g++-aarch64-linux-gnu qemu-user

.PHONY: demo docs test test-full curl cross-tools bench-cpu lint format clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/tokenspeed generate --temperature 0 --max-tokens 64 "$(PROMPT)"

test: lint curl
	$(PYTEST) $(PYTEST_ARGS)

test-full: lint curl cross-tools
	$(PYTEST) -m "slow or not slow" $(PYTEST_ARGS)

# The documentation's curl lines are run.
curl:
	@command -v curl >/dev/null || \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends curl; } || \
	  { echo "make test needs curl and could not install it" >&2; exit 1; }

# The NEON kernels are built by a cross compiler and run in an emulator.
cross-tools:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(CROSS_PACKAGES); } || \
	  { echo "make test-full needs these Debian packages and could not install them: $(CROSS_PACKAGES)" >&2; exit 1; }

bench-cpu: $(VENV)/.installed-demo
	$(BIN)/python -m tokenspeed.bench.cpu $(BENCH_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/size_report.py

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find tokenspeed tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "TokenSpeed needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing into $(VENV), about a minute"
	$(PIP) install --no-compile --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing into $(VENV), about a minute"
	$(PIP) install --no-compile --constraint constraints.txt --editable '.[demo,dev,docs]'
	@touch $@
