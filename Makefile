# Every target sets up what it needs in .venv first. `make demo` and `make test` are all a newcomer needs.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: help setup chromium demo demo-images demo-loop test test-slow lint format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP) chromium  ## create .venv and install the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	@echo "setup: creating .venv and installing pinned packages (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $(STAMP)
	@echo "setup: done ($$(DS_ACCELERATOR=cpu $(BIN)/python -c 'import torch, ray, deepspeed; print("torch", torch.__version__, "ray", ray.__version__, "deepspeed", deepspeed.__version__)' 2>/dev/null))"

# A browser for the tests of the page. Best effort: without one they are skipped, and say so.
chromium:
	@if [ -n "$$MD4_CHROMIUM" ] || command -v chromium >/dev/null; then :; \
	elif ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ]; then \
		echo "setup: no chromium here; the tests of the page are skipped (MD4_CHROMIUM=PATH names another one)"; \
	else \
		echo "setup: installing chromium (apt-get) for the tests of the page"; \
		install="env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core"; \
		{ $$install || { apt-get update -qq && $$install; }; } >/dev/null 2>&1 \
			|| echo "setup: that did not work; the tests of the page are skipped"; \
	fi

demo: $(STAMP)  ## prepare, train, evaluate, sample, serve: the whole line, about ten minutes on two cores
	@$(BIN)/python -m orchestration.demo

demo-images: $(STAMP)  ## the same for pixels: handwritten digits, real, noised, denoised and new, in a picture
	@$(BIN)/python -m orchestration.demo_images

demo-loop: $(STAMP)  ## search, train, evaluate by a clock, promote by rule, serve, refuse, roll back
	@$(BIN)/python -m orchestration.demo_loop

test: $(STAMP) chromium  ## what CI runs
	@echo "test: first what needs no Ray, in two processes; then what shares a Ray cluster"
	@$(BIN)/python -m pytest -m "not slow and not ray" --numprocesses 2 --dist loadscope
	@$(BIN)/python -m pytest -m "ray and not slow"

test-slow: $(STAMP)  ## the long forms
	@$(BIN)/python -m pytest -m slow

lint: $(STAMP)  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(STAMP)  ## let ruff rewrite
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## benchmarks, one after the other; leave the machine alone meanwhile
	@for file in tests/benchmarks/bench_*.py; do $(BIN)/python -m tests.benchmarks.$$(basename $$file .py) || exit 1; done

clean:  ## remove the environment and caches; data/ and runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
