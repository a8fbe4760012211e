# make quickstart   create the environment, train on generated shapes, draw the predictions
# make test         create the environment, run all tests
# make test-newest  the same for a core of the tests, with the newest other Python on this machine
# make bench        compare the speed with torchvision on this machine: two cases
# make bench-gpu    the two GPU cases, with this machine's own jax, flax, optax and torch
# make bench-start  compare start, prediction, evaluation and input with the commit before
# make notebooks    run the notebooks, or those in NAMES, and store their outputs
# make docs         create the environment, build the documentation site into site/
# make lint         create the environment, check format, style, types and imports
# make coverage     run all tests, show which share of each room's lines and branches they reach
# make dist         build the source distribution and the wheel into dist/, check and install them
# make resolve      show what the CUDA and TPU extras install on each Python

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-core test-newest bench bench-gpu bench-start notebooks docs lint coverage dist resolve format clean

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

notebooks: $(VENV)/.test
	$(BIN)/python notebooks/execute.py $(NAMES)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=
	@for room in $$(ls -d deeplab_jax/*/ | grep -v '/configs/\|/__pycache__/'); do \
	  printf '%-30s' $$room; $(BIN)/python -m coverage report --format=total --include="$$room*"; \
	done
	$(BIN)/python -m coverage report --skip-covered

dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build
	DEEPLAB_JAX_DIST=$(CURDIR)/dist $(BIN)/python -m pytest tests/test_wheel.py

resolve: $(VENV)/.test
	$(BIN)/python tests/resolve_extras.py

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-newest .cache build dist site *.egg-info runs/quickstart

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.package

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@
