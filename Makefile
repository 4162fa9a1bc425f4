# `make demo` and `make test` each set everything up from nothing; the second call is quick.

SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,$(if \
  $(shell $(python) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(python))))
VENV ?= .venv
RUN ?= runs/quickstart
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
GROUND = pyproject.toml constraints.txt
# Two at a time: what waits for the test cluster beside what computes.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# DeepSpeed, where it is installed, must not look for a CUDA compiler.
export DS_BUILD_OPS = 0
# Nothing is fetched but packages.
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-full lint format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.demo ## the whole method on this machine, tiny, in minutes; see runs/quickstart
	@$(VENV)/bin/insightv run configs/chain/quickstart.yaml --run-dir $(RUN)

test: $(VENV)/.test lint ## lint, types and every test that a landing waits for
	@$(PYTEST)

test-full: $(VENV)/.test lint ## make test, and the long tests
	@$(PYTEST) -m "full or not full"

lint: $(VENV)/.test ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(VENV)/.test ## let ruff rewrite what it can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean: ## remove the environment and caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { \
	  echo "No Python 3.11 or newer found: install one, or name it: make demo PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than 3.11: name a newer one: make demo PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }

$(VENV)/.demo: $(GROUND) | $(VENV)/bin/python
	@echo "Installing into $(VENV) (minutes the first time)"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(GROUND) | $(VENV)/bin/python
	@echo "Installing into $(VENV) (minutes the first time)"
	@$(PIP) -e '.[demo,test,megatron,deepspeed,serve,tensorboard]'
	@touch $@ $(VENV)/.demo
