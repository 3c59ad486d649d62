# Two commands do it all on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Two test workers share two cores, so each keeps to one thread; threads that wait do not spin.
export OMP_WAIT_POLICY := PASSIVE
test check: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check bench papers gallery docs format browser clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

demo: $(VENV)/.base ## audit a real model on real photographs, and say where the report lies
	$(BIN)/perturbkit audit demo --out audit

check: $(VENV)/.test ## the quick subset: format, lint, types, contracts and the tests of core
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 tests/core tests/dev/test_stubs.py

test: $(VENV)/.test ## everything that must hold
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2

bench: $(VENV)/.bench ## side by side with peers, as ratios
	$(BIN)/python -m benchmarks

papers: $(VENV)/.base ## every reproduction, then the gallery
	$(BIN)/perturbkit papers reproduce --all --jobs 2 --out gallery; status=$$?; $(BIN)/perturbkit papers gallery --out gallery; exit $$status

docs: $(VENV)/.docs ## the site, into site/, with the gallery of what `make papers` has found
	$(BIN)/perturbkit dev docs
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/perturbkit papers gallery --out gallery
	cp -r gallery site/gallery

format: $(VENV)/.test ## format and fix what a machine can
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/perturbkit dev stubs

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist site
