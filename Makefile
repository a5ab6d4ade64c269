# Everything happens in .venv; `make quickstart` and `make test` need nothing done before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1

.PHONY: help quickstart test test-slow chaos lint bench clean

help:  ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Basin needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11 quickstart"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,xtb,sella,mpi]'
	@touch $@

quickstart: $(VENV)/.installed  ## Relax about 65 real molecules with MMFF94 and GFN2-xTB; write a report.
	$(BIN)/basin run jobs/quickstart.toml --report

# Two files of tests at a time: much of what they do is to wait for processes and clocks.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.installed-dev  ## Run the test suite (minutes); slow physics is left out.
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev  ## Run the slow tests, which `make test` leaves out.
	$(PYTEST) -m slow

MINUTES ?= 20
chaos: $(VENV)/.installed-dev  ## Disturb a campaign on a real SLURM for MINUTES=20 (root, slurm-wlm, munge).
	$(BIN)/python -m benchmarks.chaos --minutes $(MINUTES)

lint: $(VENV)/.installed-dev  ## Check style and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## Measure speed and size; prints tables (about 20 minutes).
	$(BIN)/python -m benchmarks.all

clean:  ## Remove the environment and the quickstart's results.
	rm -rf $(VENV) results build *.egg-info .mypy_cache .ruff_cache .pytest_cache
