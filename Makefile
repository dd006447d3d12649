# From a fresh clone, with nothing but make and Python 3.11 or newer:
#   make demo    a miniature learns a voice; open runs/demo/report.html
#   make check   style, types, imports and the tests that start no process: three minutes
#   make test    all tests but those of `make proof`
#   make proof   faults by the dozen, long runs, benches: by hand, for dev/LOG.md
#   make lint    style, types and imports
#   make docs    the site of docs/, in site/
# The first one creates .venv and installs into it; PYTHON names the interpreter (make test PYTHON=python3.12).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/installed

# Models as small as those of tests and demo are slower on several threads, and many times so on a busy machine.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

# Files of tests are shared out over as many processes (make test PYTEST_WORKERS=1). The longest file takes about a
# quarter of the time, so that more than four would only cost memory: about 1 GB each.
PYTEST_WORKERS ?= logical

# Of the benches in `make proof` (make proof BENCH_OPTIONS=--quick: whether they work, in minutes rather than hours).
BENCH_OPTIONS ?=

PYTEST := $(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder

.PHONY: check test proof demo docs lint install

check: lint
	$(PYTEST) -m "not processes and not proof"

test: $(INSTALLED)
	$(PYTEST) -m "not proof"

proof: $(INSTALLED)
	$(BIN)/python -m pytest -m proof
	$(BIN)/python tools/faults/random_faults.py --faults 50
	set -e; for name in endurance train_step data_path codec generation planning; do \
		echo "== $$name"; $(BIN)/python bench/$$name.py $(BENCH_OPTIONS); done

demo: $(INSTALLED)
	$(BIN)/higgstune demo --out runs/demo

docs: $(INSTALLED)
	$(PIP) install --constraint constraints.txt --editable ".[docs]"
	$(BIN)/zensical build --strict --clean

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

install: $(INSTALLED)

# pip is the last thing that goes into an environment: one without it was cut off, and is completed.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is not Python 3.11 or newer: name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@
