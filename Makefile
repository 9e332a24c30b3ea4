# `make quickstart` and `make test` do all the set-up on a fresh machine; nothing else is clever in it.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
JOB ?= jobs/quickstart.yaml
ARGS ?=
BIN = $(VENV)/bin

.PHONY: quickstart test slow faults lint clean

quickstart: $(VENV)/.installed
	$(BIN)/diffpruning run $(JOB) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not ray and not slow" --numprocesses auto --dist worksteal
	$(BIN)/python -m pytest -m "ray and not slow"

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not ray" --numprocesses auto --dist worksteal

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m faults

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("diffpruning needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) torch
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info
