# make demo, make test, make lint, make bench: everything else is `diffalign --help`.
# PIP_ARGS= reaches pip, for another index or for wheels on disk; VENV= and PYTHON= choose where and with what; JOBS= how many
# processes test.
VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt

.PHONY: demo install install-dev test test-slow lint format bench bench-rewards bench-methods bench-online bench-audio clean

demo: install
	$(BIN)/diffalign demo

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffalign needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: anything looser may bring another build of it
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

# one thread a process: two that fight for the same cores are slower than one
test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-slow: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow --override-ini addopts="--strict-markers -q"

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install-dev
	$(BIN)/python -m benchmarks.step

# true sizes, random weights: half an hour on two cores
bench-rewards: install-dev
	$(BIN)/python -m benchmarks.rewards

# hours on two cores; what is finished is kept, so it can be cut and started again
bench-methods: install-dev
	$(BIN)/python -m benchmarks.methods

# hours too, and goes on as bench-methods does
bench-online: install-dev
	$(BIN)/python -m benchmarks.online

# DRAGON on sounds; goes on as the others do
bench-audio: install-dev
	$(BIN)/python -m benchmarks.audio

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
