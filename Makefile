# Two commands for a fresh machine: `make demo` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint kernels clean

# torch first and by its pinned version: an open requirement would bring the CUDA build, several gigabytes.
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(wildcard src/shoal/engine/native/*.h src/shoal/engine/native/*.cpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable .
	touch $@

$(VENV)/dev-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

kernels:
	$(PYTHON) setup.py kernels

clean:
	rm -rf $(VENV) build src/*.egg-info src/shoal/engine/native/*.so
