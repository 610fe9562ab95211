# `make demo` and `make test` need nothing but Python >= 3.11 and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Several processes, in the order of the files: those of tests/unit are short, and come last.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-slow test-matrix test-planted torture bench check fix clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pgebus needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "Installing into $(VENV); this takes about a minute, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## the main job, on an embedded PostgreSQL, in under 20 seconds
	@$(BIN)/pgebus demo

test: $(STAMP) ## every test of the default lane, on an embedded PostgreSQL
	$(PYTEST) $(ARGS)

test-slow: $(STAMP) ## the longer lanes as well
	$(PYTEST) -m '' $(ARGS)

bench: $(STAMP) ## what it costs, beside whoever else is installed; about an hour (ARGS="drain latency --runs 1")
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m benchmarks --install $(ARGS)

torture: $(STAMP) ## 100,000 events under faults of every kind, and then the books are checked (ARGS="--events 1000000 --seed 7")
	$(BIN)/python -m torture $(ARGS)

test-matrix: $(STAMP) ## every PostgreSQL, the oldest and the newest libraries; about an hour
	$(BIN)/python -m tests.matrix $(ARGS)

test-planted: $(STAMP) ## bugs that are put into a copy of the source, and have to be noticed; half an hour (ARGS="B7 B20")
	$(BIN)/python -m tests.planted $(ARGS)

check: $(STAMP) ## format, lint, types, direction of imports: no database
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP) ## format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what make made
	rm -rf .planted.jsonl $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
