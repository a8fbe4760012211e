# make quickstart   set up, train on generated shapes, and show where the predictions lie
# make test         set up, run all tests
# make bench        measure against torchvision here: two cases
# make bench-gpu    the same with this machine's own jax, flax, optax and torch
# make lint         set up, check format, style and types

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test bench bench-gpu lint format clean

quickstart: .venv/.package
	$(BIN)/python train.py --config configs/shapes.py --workdir runs/quickstart

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: .venv/.test
	$(BIN)/python -m benchmarks.speed --quick

bench-gpu:
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m benchmarks.speed --quick --json bench_gpu.json

lint: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .cache build *.egg-info runs/quickstart

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/.package: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ .venv/.package
