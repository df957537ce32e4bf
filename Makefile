PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all lint format types docs mutants check

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/foveate run src/foveate/nano/sample.png \
	  "$$($(BIN)/python -c 'from foveate import nano; print(nano.sample().question)')" --keep 32 --compare --out runs/demo

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict --quiet

mutants: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "mutmut>=3.8"
	OMP_NUM_THREADS=1 $(BIN)/mutmut run "foveate.$(OF)*"
	$(BIN)/mutmut results | sed -n '/survived/p'

check: lint types test-all docs
