# `make` lists the targets. Every target works in .venv, which it makes by itself; PYTHON=... uses another environment.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help venv test test-all check sft dpo require-config clean

CONFIG ?=
ARGS ?=
NPROC ?=
PYTEST_WORKERS ?= 2

# The user's interpreter is taken as it is. Ours is made, and made anew when setup.py changes.
ifeq ($(strip $(PYTHON)),)
  override PYTHON := .venv/bin/python
  ENVIRONMENT := .venv/.installed
endif
# Recipes read these from the environment, in quotes: a path with spaces, quotes or semicolons stays one word.
export PYTHON CONFIG NPROC
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# A console script would not start from a folder with a space in its name; `-m` does. The folder of the interpreter's
# scripts goes on PATH because DeepSpeed looks for `ninja` there.
ON_PATH = PATH="$$("$$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH"
TEST = $(ON_PATH) OMP_NUM_THREADS=1 "$$PYTHON" -m pytest -n "$(PYTEST_WORKERS)" --dist=loadfile
LAUNCH = $(ON_PATH) "$$PYTHON" -m deepspeed.launcher.runner $(if $(strip $(NPROC)),--num_gpus "$$NPROC")
CODE = $(wildcard pivot launch data_tools)

help:  ## List the targets
	@echo 'make TARGET [PYTHON=python] [CONFIG=run.yaml] [ARGS="key=value ..."] [NPROC=processes]'
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 14
	@echo 'PYTHON= uses that environment and installs nothing. NPROC= is by default all GPUs, or one CPU process.'
	@echo 'ARGS= is read by the shell: quote a value that holds spaces or brackets.'

venv: $(ENVIRONMENT)  ## Make .venv and install the package with its test and check tools

test: $(ENVIRONMENT)  ## Run the tests that take seconds and need no GPU
	@$(TEST) $(ARGS)

test-all: $(ENVIRONMENT)  ## Run every test; those for a GPU only where there is one
	@if "$$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(TEST) -m '' $(ARGS); else $(TEST) -m 'not gpu' $(ARGS); fi

check: $(ENVIRONMENT)  ## Lint, check the formatting and the types
	@"$$PYTHON" -m ruff check .
	@"$$PYTHON" -m ruff format --check .
	@"$$PYTHON" -m mypy $(CODE)

sft:  ## Train with SFT: CONFIG=run.yaml
dpo:  ## Train with DPO: CONFIG=run.yaml
sft dpo: require-config $(ENVIRONMENT)
	@$(LAUNCH) launch/train_$@.py "$$CONFIG" $(ARGS)

require-config:
	@if [ -z "$$CONFIG" ]; then \
	  echo 'CONFIG is absent: the demo without arguments comes with a later release; give CONFIG=run.yaml' >&2; exit 2; fi

# torch and torchvision come first, together and unpinned: torchvision only imports beside the torch of its own release.
# -qq keeps the addresses of package mirrors out of logs.
.venv/.installed: setup.py
	@python=''; for candidate in python3 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	  then python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo 'found no Python 3.11 to 3.13 on PATH; install one, or give PYTHON= of an environment to use' >&2; exit 2; fi; \
	.venv/bin/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear .venv
	@echo 'installing into .venv (a few minutes and about 6 GB the first time)'
	@.venv/bin/python -m pip install -qq torch torchvision
	@.venv/bin/python -m pip install -qq -e '.[test,check]'
	@touch $@

clean:  ## Remove caches; .venv and runs/ stay
	@find . -path ./.venv -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
