# Fine-tunes and aligns a language model on one GPU, or a tiny one on none.
# Needs make and Python 3.11, 3.12 or 3.13; everything else goes into .venv.
#
#   make run                             SFT, DPO and the comparison of the embedded recipe
#   make run RECIPE=llama31_8b           the same for another recipe, on a machine with a GPU
#   make doctor RECIPE=llama31_8b        whether that recipe can run here: driver, memory, disk, network, cache
#   make run STAGES=sft,dpo,reward,kto   these stages in this order, and the comparison of what answers
#   make run ARGS="--set dpo.beta=0.2"   with options for all scripts
#   make test                            the test suite; make test ARGS="-k masking" for a part of it
#   make test-long                       what the test suite leaves out: what takes half a minute or more
#   make test-campaigns                  before a release: campaigns of minutes each
#   make lint                            ruff, formatting, types
#   make docs                            docs/recipe.md, from the recipe's schema
#   make setup                           .venv alone; make setup PYTHON=python3.12 to choose the interpreter
#   make setup TORCH_INDEX=URL           torch from this wheel index instead of the one that the driver asks for
#   make optional                        adds TensorBoard, W&B and what `run_eval.py --tasks` and exports for servers
#                                        need; `make test` adds it too
#   make clean                           removes caches; .venv and runs/ stay

RECIPE ?= tiny
STAGES ?= sft,dpo
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

# Where torch comes from. PyPI's build is for CUDA 13; a driver that is too old for it, as of many rented cards, gets the
# same version for CUDA 12.6 from PyTorch's own index. (Written from their documentation; not run against that index.)
CUDA13_DRIVER := 580
CUDA12_DRIVER := 525
CUDA13_INDEX := https://download.pytorch.org/whl/cu130
CUDA12_INDEX := https://download.pytorch.org/whl/cu126
TORCH_INDEX ?= $(shell test "$(NVIDIA)" = yes && test "$(DRIVER)" -lt $(CUDA13_DRIVER) 2>/dev/null && echo $(CUDA12_INDEX))
# PyPI's xFormers is for CUDA 12.8 and cannot load beside CUDA 13: it comes from where its torch's CUDA is built for.
XFORMERS_INDEX = $(or $(TORCH_INDEX),$(CUDA13_INDEX))
XFORMERS_LOADS := from xformers._cpp_lib import _register_extensions as load; load()
CHOICE = $(or $(NVIDIA),no) GPU, index $(or $(TORCH_INDEX),PyPI)

# A TORCH_INDEX that is named moves an installed torch there; without one an installed .venv stays as it was chosen.
ifneq ($(origin TORCH_INDEX),file)
ifneq ($(wildcard $(INSTALLED)),)
ifneq ($(shell cat $(INSTALLED)),$(CHOICE))
REPLACED := torch xformers
$(shell rm -f $(INSTALLED))
endif
endif
endif

# A pod's volume outlives the interpreter that .venv was made with: a stamp alone does not prove that it still runs.
ifneq ($(wildcard $(INSTALLED)),)
ifneq ($(shell $(VENV_PYTHON) -c 'print(1)' 2>/dev/null),1)
$(shell rm -f $(INSTALLED))
endif
endif

comma := ,
define newline


endef
KNOWN := sft dpo reward kto rl
NAMED := $(subst $(comma), ,$(STAGES))
ifneq ($(or $(filter-out $(KNOWN),$(NAMED)),$(if $(NAMED),,none)),)
$(error STAGES=$(STAGES): name one or more of $(KNOWN), with commas between)
endif

.PHONY: help setup optional doctor run test test-long test-campaigns lint docs clean
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
	$(foreach stage,$(NAMED),$(VENV_PYTHON) run_$(stage).py --recipe "$(RECIPE)" --if-present $(ARGS)$(newline))
	$(VENV_PYTHON) run_compare.py --recipe "$(RECIPE)" $(ARGS)

test: $(DEV)
	$(VENV_PYTHON) -m pytest $(ARGS)

test-long: $(DEV)
	$(VENV_PYTHON) -m pytest -m "long and not campaign" $(ARGS)

test-campaigns: $(DEV)
	$(VENV_PYTHON) -m pytest -m campaign $(ARGS)

lint: $(DEV)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

docs: $(INSTALLED)
	$(VENV_PYTHON) -m toolkit.recipe.document > docs/recipe.md

# A stamp goes first and comes back last, so that an install which was cut short is taken up again.
# The Dockerfile repeats the pip steps; tests/test_setup.py holds the two together.
$(INSTALLED): requirements.txt requirements-unsloth.txt requirements-gpu.txt requirements-xformers.txt
	@rm -f $@
	@if [ "$(origin TORCH_INDEX) $(NVIDIA)" = "file yes" ] && [ "$(DRIVER)" -lt $(CUDA12_DRIVER) ] 2>/dev/null; then \
	  echo "The NVIDIA driver here is $(DRIVER), too old for either build of the pinned torch: PyPI's for CUDA 13 needs" >&2; \
	  echo "$(CUDA13_DRIVER) or newer, PyTorch's for CUDA 12.6 ($(CUDA12_INDEX)) $(CUDA12_DRIVER) or newer." >&2; \
	  echo "Take a machine with a newer driver (hosts let you filter for the CUDA version), or name a wheel index that" >&2; \
	  echo "has this torch for an older CUDA: make setup TORCH_INDEX=https://..." >&2; \
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
	@if [ -n "$(REPLACED)" ]; then set -x; $(VENV_PYTHON) -m pip uninstall -y $(REPLACED); fi
	@if [ -n "$(TORCH_INDEX)" ]; then set -x; $(PIP_INSTALL) --no-deps --index-url "$(TORCH_INDEX)" torch -c requirements.txt; fi
	$(PIP_INSTALL) -r requirements.txt
	$(PIP_INSTALL) --no-deps -r requirements-unsloth.txt
	@if [ "$(NVIDIA)" = yes ]; then set -x; $(PIP_INSTALL) -c requirements.txt -r requirements-gpu.txt; fi
	@if [ "$(NVIDIA)" = yes ]; then \
	  $(PIP_INSTALL) --no-deps --index-url "$(XFORMERS_INDEX)" -r requirements-xformers.txt \
	  && $(VENV_PYTHON) -c '$(XFORMERS_LOADS)' && echo "attention: xFormers, it loads beside this torch" \
	  || { $(VENV_PYTHON) -m pip uninstall -y xformers; echo "attention: torch's SDPA; xFormers is left out, no build loads here"; }; \
	fi
	@echo "$(CHOICE)" > $@

$(OPTIONAL): requirements-optional.txt requirements-quantise.txt $(INSTALLED)
	@rm -f $@
	$(PIP_INSTALL) -c requirements.txt -r requirements-optional.txt
	$(PIP_INSTALL) --no-deps -r requirements-quantise.txt
	@touch $@

$(DEV): requirements-dev.txt $(OPTIONAL)
	@rm -f $@
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis unsloth_compiled_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
