# Every target makes its own .venv first when there is none, and again when its requirements change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STEPS ?= 7000
# Two processes share the tests; a thread each, for two that spin on two cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-all chaos check bench format

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

train: $(READY) ## a first model on the embedded corpus, 2 to 3 minutes on two cores
	$(BIN)/orchestrate train fundamentallm/small --name first-run budget.steps=$(STEPS) \
		evaluation.every_steps=2000 evaluation.max_tokens=131072 checkpoint.every_steps=1000

test: $(READY) ## the fast suite
	$(PYTEST) -m "not slow and not chaos and not gpu and not cluster"

test-slow: $(READY) ## the slow remainder, some 35 minutes on two cores
	$(PYTEST) -m "(slow or cluster) and not chaos and not gpu"

test-all: test test-slow ## both

chaos: $(READY) ## kill and corrupt, the full counts; can be stopped and goes on
	$(BIN)/python -m benchmarks.chaos

check: $(READY) ## style, types and the layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

bench: $(READY) ## every published number
	$(BIN)/python -m benchmarks

format: $(READY) ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
