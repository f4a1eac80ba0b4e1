# Two commands do everything: `make demo` and `make test`. Each makes its own environment in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types unit bench install clean

demo: $(VENV)/.installed
	$(BIN)/polm run recipes/demo.yaml

test: lint types unit

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2

# The peers are a part of the test environment. Flags: make bench ARGS="--work sft --models 10m --repeats 3"
bench: $(VENV)/.installed-test
	$(BIN)/python -m bench $(ARGS)

install: $(VENV)/.installed

# A stamp is newer than what it was made from, so a re-run installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
