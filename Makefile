# Fine-tunes and aligns a language model on one GPU, or a tiny one on none.
# Needs make and Python 3.11, 3.12 or 3.13; everything else goes into .venv.
#
#   make run                             SFT, DPO and the comparison of the embedded recipe
#   make run RECIPE=llama31_8b           the same for another recipe, on a machine with a GPU
#   make doctor RECIPE=llama31_8b        whether that recipe can run here: driver, memory, disk, network, cache
#   make run ARGS="--set dpo.beta=0.2"   with options for all three scripts
#   make test                            the test suite; make test ARGS="-k masking" for a part of it
#   make test-long                       what the test suite leaves out: campaigns of minutes
#   make lint                            ruff, formatting, types
#   make docs                            docs/recipe.md, from the recipe's schema
#   make setup                           .venv alone; make setup PYTHON=python3.12 to choose the interpreter
#   make optional                        adds TensorBoard, W&B and what `run_eval.py --tasks` needs; `make test` adds it too
#   make clean                           removes caches; .venv and runs/ stay

RECIPE ?= tiny
ARGS ?=
PYTHON ?=

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check
# Stamps, each upon the one before: what `make run` needs, then the optional packages, then the tools for tests
INSTALLED := $(VENV)/.installed
OPTIONAL := $(VENV)/.installed-optional
DEV := $(VENV)/.installed-dev

IN_RANGE := sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
NVIDIA ?= $(shell test -e /proc/driver/nvidia/version || nvidia-smi -L >/dev/null 2>&1 && echo yes)
DRIVER ?= $(shell { nvidia-smi --query-gpu=driver_version --format=csv,noheader || cat /proc/driver/nvidia/version; } \
	2>/dev/null | grep -oE '[0-9]{3,}\.[0-9.]+' | head -n 1 | cut -d. -f1)
MIN_DRIVER ?= 580# the oldest NVIDIA driver that runs CUDA 13, which the pinned torch is built for

# A pod's volume outlives the interpreter that .venv was made with: a stamp alone does not prove that it still runs.
ifneq ($(wildcard $(INSTALLED)),)
ifneq ($(shell $(VENV_PYTHON) -c 'print(1)' 2>/dev/null),1)
$(shell rm -f $(INSTALLED))
endif
endif

.PHONY: help setup optional doctor run test test-long lint docs clean
.DEFAULT_GOAL := help

help:
	@sed -n -e '/^#/!q' -e 's/^# \{0,1\}//p' Makefile

setup: $(INSTALLED)
	@echo "$(VENV) is ready"

optional: $(OPTIONAL)
	@echo "$(VENV) holds the optional packages"

doctor: $(INSTALLED)
	$(VENV_PYTHON) run_doctor.py --recipe "$(RECIPE)" $(ARGS)

run: $(INSTALLED)
	$(VENV_PYTHON) run_sft.py --recipe "$(RECIPE)" --if-present $(ARGS)
	$(VENV_PYTHON) run_dpo.py --recipe "$(RECIPE)" --if-present $(ARGS)
	$(VENV_PYTHON) run_compare.py --recipe "$(RECIPE)" $(ARGS)

test: $(DEV)
	$(VENV_PYTHON) -m pytest $(ARGS)

test-long: $(DEV)
	$(VENV_PYTHON) -m pytest -m long $(ARGS)

lint: $(DEV)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

docs: $(INSTALLED)
	$(VENV_PYTHON) -m toolkit.recipe.document > docs/recipe.md

# A stamp goes first and comes back last, so that an install which was cut short is taken up again.
# The Dockerfile repeats the pip steps; tests/test_setup.py holds the two together.
$(INSTALLED): requirements.txt requirements-unsloth.txt requirements-gpu.txt
	@rm -f $@
	@if [ "$(NVIDIA)" = yes ] && [ "$(DRIVER)" -lt $(MIN_DRIVER) ] 2>/dev/null; then \
	  echo "The NVIDIA driver here is $(DRIVER); the pinned torch is built for CUDA 13 and needs $(MIN_DRIVER) or newer." >&2; \
	  echo "Take a machine with a newer driver (hosts let you filter for CUDA 13), or put a build of the same torch" >&2; \
	  echo "for an older CUDA into $(VENV) yourself and run: make setup MIN_DRIVER=0" >&2; \
	  exit 1; \
	fi
	@$(VENV_PYTHON) -c 'import pip, sys; $(IN_RANGE)' 2>/dev/null || { \
	  rm -rf $(VENV); \
	  for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	    if "$$python" -c 'import ensurepip, sys, venv; $(IN_RANGE)' >/dev/null 2>&1; then \
	      echo "making $(VENV) with $$python"; \
	      exec "$$python" -m venv $(VENV); \
	    fi; \
	  done; \
	  echo "No Python 3.11, 3.12 or 3.13 that runs and can make a virtual environment was found" >&2; \
	  echo "(tried: $(or $(PYTHON),python3.13 python3.12 python3.11 python3))." >&2; \
	  echo "Install one (on Debian and Ubuntu python3-venv too), or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	}
	$(PIP_INSTALL) -r requirements.txt
	$(PIP_INSTALL) --no-deps -r requirements-unsloth.txt
	@if [ "$(NVIDIA)" = yes ]; then set -x; $(PIP_INSTALL) -c requirements.txt -r requirements-gpu.txt; fi
	@touch $@

$(OPTIONAL): requirements-optional.txt $(INSTALLED)
	@rm -f $@
	$(PIP_INSTALL) -c requirements.txt -r requirements-optional.txt
	@touch $@

$(DEV): requirements-dev.txt $(OPTIONAL)
	@rm -f $@
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis unsloth_compiled_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
