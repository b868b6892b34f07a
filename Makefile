# `make demo` and `make test` need nothing but Python 3.11 or newer: each sets up .venv (pinned by constraints.txt) first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_INPUT := 1

# data sets that lie beside the checkout are used unless MANGO_DATA says otherwise
ifndef MANGO_DATA
ifneq ($(wildcard ../shared/data/.),)
export MANGO_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint types readme bench compare policies policies-small clean

help:                ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' Makefile

setup: $(READY)      ## the virtual environment .venv with everything in it, pinned

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"{sys.executable} is Python {v[0]}.{v[1]}; MANGO needs 3.11 to 3.13: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@echo "setting up $(VENV) with $(PYTHON) (a few minutes the first time)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --progress-bar off -c constraints.txt -e ".[train,hub,dev]"
	@touch $@

demo: $(READY)       ## collect, learn, freeze, plug in, compare: at most 10 minutes on 2 cores; writes demo.json
	$(BIN)/mango demo --json demo.json

test: $(READY)       ## the whole test suite: at most 12 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

check: lint types test  ## what has to pass before a commit (the README's examples are tests)

lint: $(READY)       ## ruff
	$(BIN)/ruff check .

types: $(READY)      ## mypy --strict
	$(BIN)/mypy

readme: $(READY)     ## fill the README's results from benchmarks/results and demo.json
	$(BIN)/python -m experiments.readme_table

bench: $(READY)      ## the benchmarks, one after another; results go to benchmarks/results
	@set -e; for program in $$(grep -l __main__ benchmarks/*.py); do echo "== $$program"; $(BIN)/python -m "benchmarks.$$(basename $$program .py)"; done

compare: $(READY)    ## every optimizer on one bench: tables, figures, a page in runs/compare (20 minutes)
	$(BIN)/python -m experiments.compare --scale small --out runs/compare

policies: $(READY)   ## the shipped policy from seeds: record, learn, gate, freeze, evaluate (hours); needs MANGO_DATA
	$(BIN)/python -m experiments.make_universal --root runs/universal

policies-small: $(READY)  ## the same in a quarter of an hour, without data to get; the policy goes to runs/universal-small
	$(BIN)/python -m experiments.make_universal --root runs/universal-small --out runs/universal-small --small

clean:               ## remove the environment, builds, caches and the demo's output
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis runs demo.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
