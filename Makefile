# make quickstart   create the environment, train on generated shapes, draw the predictions
# make test         create the environment, run all tests
# make test-newest  the same for a core of the tests, with the newest other Python on this machine
# make bench        compare the speed with torchvision on this machine: two cases
# make bench-gpu    the two GPU cases, with this machine's own jax, flax, optax and torch
# make bench-start  compare start, prediction, evaluation and input with the commit before
# make lint         create the environment, check format, style, types and imports

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-core test-newest bench bench-gpu bench-start lint format clean

quickstart: $(VENV)/.package
	$(BIN)/python train.py --config configs/shapes.py --workdir runs/quickstart

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-core: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m core

test-newest:
	newest=$$($(PYTHON) tests/newest_python.py); \
	if [ -n "$$newest" ]; then $(MAKE) test-core VENV=.venv-newest PYTHON="$$newest"; fi

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.speed --quick

bench-gpu:
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m benchmarks.speed --quick --json bench_gpu.json

bench-start: $(VENV)/.test
	$(BIN)/python -m benchmarks.against

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-newest .cache build *.egg-info runs/quickstart

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.package
