# `make` lists the targets. Every target works in .venv, which it makes by itself; PYTHON=... uses another environment.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help venv lock test test-all test-slurm test-oldest test-newest check shards bench bench-data sft dpo recipe demo-start demo-sft demo-dpo clean

CONFIG ?=
ARGS ?=
NPROC ?=
SRC ?=
OUT ?=
PYTEST_WORKERS ?= 2

# The user's interpreter is taken as it is. Ours is made, and made anew when requirements.lock changes.
ifeq ($(strip $(PYTHON)),)
  override PYTHON := .venv/bin/python
  ENVIRONMENT := .venv/.installed
endif
# The demo's folder and seed; `make dpo DEMO=runs/demo1 SEED=1` is the same with other scenes and other weights.
DEMO ?= runs/demo
SEED ?= 0
# It names targets, which know no quotes: what make or a shell would read as more than a name is refused.
HASH := \#
ODD := $(strip $(filter-out 1,$(words $(DEMO))) \
  $(foreach letter,; & | < > ` ' " \ $$ * ? [ ] { } ! $(HASH),$(findstring $(letter),$(DEMO))))
ifneq ($(ODD),)
  $(error DEMO: found "$(DEMO)", expected the name of a folder without blanks, quotes and letters that a shell reads)
endif
# Recipes read these from the environment, in quotes: a path with spaces, quotes or semicolons stays one word.
export PYTHON CONFIG NPROC SEED SRC OUT
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# A console script would not start from a folder with a space in its name; `-m` does. The folder of the interpreter's
# scripts goes on PATH because DeepSpeed looks for `ninja` there.
ON_PATH = PATH="$$("$$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH"
TEST = $(ON_PATH) OMP_NUM_THREADS=1 "$$PYTHON" -m pytest -n "$(PYTEST_WORKERS)" --dist=loadfile
LAUNCH = $(ON_PATH) "$$PYTHON" -m deepspeed.launcher.runner $(if $(strip $(NPROC)),--num_gpus "$$NPROC")
CODE = $(wildcard pivot launch data_tools)
# Print one package's lines of the lock file.
LOCKED = sed -n '/^$(1)==/,/[^\]$$/p' requirements.lock

help:  ## List the targets
	@echo 'make TARGET [PYTHON=python] [CONFIG=run.yaml] [ARGS="key=value ..."] [NPROC=processes]'
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 14
	@echo 'PYTHON= uses that environment and installs nothing. NPROC= is by default all GPUs, or one CPU process (the demo: two).'
	@echo 'ARGS= is read by the shell: quote a value that holds spaces or brackets.'

venv: $(ENVIRONMENT)  ## Make .venv and install the package with its test and check tools

lock: $(ENVIRONMENT)  ## Write requirements.lock anew: ARGS=--upgrade takes the newest of everything
	@"$$PYTHON" -m uv --quiet pip compile setup.py --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-header --output-file requirements.lock $(ARGS)

test: $(ENVIRONMENT)  ## Run the tests that take seconds and need no GPU
	@$(TEST) $(ARGS)
	@echo "passed: $$("$$PYTHON" -m pivot.versions)"

test-all: $(ENVIRONMENT)  ## Run every test; those for a GPU only where there is one
	@if "$$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(TEST) -m '' $(ARGS); else $(TEST) -m 'not gpu' $(ARGS); fi
	@echo "passed: $$("$$PYTHON" -m pivot.versions)"

test-slurm: $(ENVIRONMENT)  ## Run launch/slurm/ on a SLURM of two nodes, started on this machine (about 10 minutes)
	@$(ON_PATH) OMP_NUM_THREADS=1 "$$PYTHON" -m pytest -m slurm tests/slurm $(ARGS)

test-oldest: .venv-oldest/.installed  ## Run the tests with the oldest releases that pivot/versions.py allows
	@$(MAKE) --no-print-directory test PYTHON="$$PWD/.venv-oldest/bin/python"

test-newest: .venv-newest/.made  ## Run the tests with the newest releases that pivot/versions.py allows
	@echo 'installing the newest releases into .venv-newest'
	@.venv-newest/bin/python -m pip install -qq --upgrade --upgrade-strategy eager -e '.[test]'
	@$(MAKE) --no-print-directory test PYTHON="$$PWD/.venv-newest/bin/python"

check: $(ENVIRONMENT)  ## Lint, check the formatting and the types
	@"$$PYTHON" -m ruff check .
	@"$$PYTHON" -m ruff format --check .
	@"$$PYTHON" -m mypy $(CODE)

shards: $(ENVIRONMENT)  ## Pack a data set: SRC=folder-or-file OUT=folder ARGS="--image-root DIR"
	@if [ -z "$$SRC" ] || [ -z "$$OUT" ]; then \
	  echo 'SRC or OUT is absent: make shards SRC=MMPR-v1.2 OUT=shards/mmpr [ARGS="--image-root DIR"]' >&2; exit 2; fi
	@"$$PYTHON" -m data_tools pack "$$SRC" --out "$$OUT" $(if $(strip $(NPROC)),--workers "$$NPROC") $(ARGS)

bench: $(ENVIRONMENT)  ## Measure DPO steps beside TRL's: a table and a plot in docs/ (about 8 minutes; an idle machine)
	@"$$PYTHON" benchmarks/dpo_step.py --against trl --table docs/dpo_step.md --plot docs/images/dpo_step.png $(ARGS)

bench-data: $(ENVIRONMENT)  ## Measure how fast samples are read, on one core
	@"$$PYTHON" benchmarks/data_loading.py $(ARGS)

sft:  ## The demo chain up to SFT; with CONFIG=run.yaml that SFT run alone
dpo:  ## The demo chain up to DPO; with CONFIG=run.yaml that DPO run alone
ifneq ($(strip $(CONFIG)),)
sft dpo: $(ENVIRONMENT)
	@$(LAUNCH) launch/train_$@.py "$$CONFIG" $(ARGS)
else
# A picture before the long install: drawing needs Pillow alone.
sft dpo: %: demo-start $(DEMO)/data/scenes.png $(ENVIRONMENT) $(DEMO)/%.done
	@"$$PYTHON" launch/demo.py table $@ $(DEMO)
endif

recipe: $(ENVIRONMENT)  ## The whole method at demo size: align, pre-train, SFT and DPO twins, swap (about half an hour on two cores)
	@$(ON_PATH) "$$PYTHON" launch/recipe.py --size launch/sizes/demo.yaml --folder runs/recipe $(ARGS)

demo-start: $(if $(ENVIRONMENT),.venv/.made)
	@"$$PYTHON" launch/demo.py start $(filter sft dpo,$(MAKECMDGOALS)) $(DEMO)

$(DEMO)/data/scenes.png:
	@$(if $(ENVIRONMENT),$(call LOCKED,pillow) >.venv/pillow.lock; "$$PYTHON" -m pip install -qq --require-hashes -r .venv/pillow.lock)
	@"$$PYTHON" -m data_tools.demo.sheet $@ positions "$$SEED"
	@echo 'a picture of the scenes: $@'

# Each step is made once. A .done file is written when a stage came to its end; one that was stopped goes on.
$(DEMO)/data/demo.json: | $(ENVIRONMENT)
	@"$$PYTHON" -m data_tools demo --out $(DEMO)/data --seed "$$SEED"
$(DEMO)/align.done: $(DEMO)/data/demo.json
$(DEMO)/sft.done: $(DEMO)/align.done
$(DEMO)/dpo.done: $(DEMO)/sft.done
$(DEMO)/%.done:
	@$(ON_PATH) "$$PYTHON" launch/demo.py stage $* $(DEMO) $(if $(filter $*,$(MAKECMDGOALS)),$(ARGS))

%/.made:
	@python=''; for candidate in python3 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	  then python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo 'found no Python 3.11 to 3.13 on PATH; install one, or give PYTHON= of an environment to use' >&2; exit 2; fi; \
	$*/bin/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $*
	@touch $@

# Exact releases, checked by hash. setuptools comes first: DeepSpeed is built with it, not with the newest of that day.
# -qq keeps the addresses of package mirrors out of logs.
.venv/.installed: requirements.lock | .venv/.made
	@echo 'installing into .venv (a few minutes and about 6 GB the first time)'
	@$(call LOCKED,setuptools) >.venv/setuptools.lock
	@.venv/bin/python -m pip install -qq --require-hashes -r .venv/setuptools.lock
	@.venv/bin/python -m pip install -qq --require-hashes --no-build-isolation -r requirements.lock
	@.venv/bin/python -m pip install -qq --no-build-isolation --no-deps -e .
	@touch $@

.venv-oldest/.installed: setup.py pivot/versions.py | .venv-oldest/.made
	@echo 'installing the oldest releases into .venv-oldest'
	@.venv-oldest/bin/python pivot/versions.py lowest >.venv-oldest/lowest.txt
	@.venv-oldest/bin/python -m pip install -qq --constraint .venv-oldest/lowest.txt -e '.[test]'
	@touch $@

clean:  ## Remove caches; .venv and runs/ stay
	@find . -path './.venv*' -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
