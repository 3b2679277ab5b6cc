# For a fresh machine: `make demo`, `make failover` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
KERNELS := setup.py $(wildcard src/shoal/engine/native/*.h src/shoal/engine/native/*.cpp src/shoal/engine/native/*.py)

.PHONY: demo failover test lint format kernels clean help

help:
	@echo 'make demo     install into .venv, fetch a small model, serve it, stream an answer'
	@echo 'make failover two engines and a gateway: one is killed in the middle of a poem, and the poem goes on'
	@echo 'make test     linters, types and all tests, as on every change'
	@echo 'make lint     ruff and mypy alone;  make format  reformats'
	@echo 'make kernels  compile the native CPU kernels again, after a change to them'
	@echo 'make clean    remove .venv and everything that was built'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "shoal needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# torch first, alone and by its pinned version: resolved together with the rest, pip may look at other builds of it, and
# each is a download of gigabytes.
$(VENV)/torch: $(BIN)/python constraints.txt
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/shoal: $(VENV)/torch pyproject.toml $(KERNELS)
	$(PIP) --editable .
	@touch $@

$(VENV)/shoal-dev: $(VENV)/torch pyproject.toml $(KERNELS)
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/shoal $@

demo: $(VENV)/shoal
	$(BIN)/python examples/demo.py

failover: $(VENV)/shoal
	$(BIN)/python examples/failover.py

lint: $(VENV)/shoal-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

format: $(VENV)/shoal-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kernels: $(VENV)/torch
	$(BIN)/python setup.py kernels

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/shoal/engine/native/*.so
