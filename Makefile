# `make run` and `make test` do all their own set-up; when nothing is missing that takes no time.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A file's tests stay in one process and share its fixtures; tests/conftest.py says which files begin.
PYTEST_FLAGS := -n 3 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test test-all check setup ui serve clean
.DELETE_ON_ERROR:

run: setup  ## optimize the models file's first model, prove it on a real Triton, and ask it a question
	$(BIN)/refinery optimize all-minilm-l6-v2
	$(BIN)/refinery query all-minilm-l6-v2 "A real checkpoint becomes text answered by a real Triton." "Triton serves the checkpoint."

test: check  ## format, lint, types, then every test
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-all: check  ## what `make test` runs, and every architecture with every task: about half an hour more
	$(BIN)/python -m pytest $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -n 3 -m whole --junitxml=.refinery/matrix.xml

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: setup  ## Dagster, with what it does by itself, and MLflow, on loopback, until Ctrl-C
	$(BIN)/refinery ui

serve: setup  ## the embedded Triton on this repository, until Ctrl-C
	$(BIN)/refinery serve

setup: $(STAMP)
	@$(BIN)/refinery setup

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"transformer-refinery needs Python 3.11 or 3.12, and $(PYTHON) is {v[0]}.{v[1]}; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo,test]'
	@touch $@

clean:  ## forget the environment; .refinery, with all that was made, stays
	rm -rf $(VENV)
