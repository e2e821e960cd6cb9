# Two commands matter: `make quickstart` and `make test`. Both set themselves up.

PYTHON ?= python3
VENV   ?= .venv

# Which build of PyTorch. "cpu" is the default where no NVIDIA GPU answers: on Linux, plain
# `pip install torch` would bring several GB of CUDA packages. `make install TORCH=cuda` takes the
# CUDA build. Where your package index has no CPU build, name one that has: TORCH_INDEX=URL.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?=

ifeq ($(TORCH),cuda)
  TORCH_REQUIREMENT = torch==$(TORCH_VERSION)
else ifeq ($(shell uname -s),Linux)
  TORCH_REQUIREMENT = torch==$(TORCH_VERSION)+cpu
else
  TORCH_REQUIREMENT = torch==$(TORCH_VERSION)
endif

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check -q

# What a failed command left behind, such as half of a venv's Python, must not count as made.
.DELETE_ON_ERROR:

.PHONY: help install quickstart test test-slow lint clean

help:
	@echo "make quickstart   install, then train a small model and see what it learned (minutes)"
	@echo "make test         install what tests need, then run them"
	@echo "make test-slow    the long tests too"
	@echo "make lint         style and types"
	@echo "make install      install into $(VENV)   [TORCH=cpu|cuda]"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch-$(TORCH): | $(VENV)/bin/python
	@echo "installing PyTorch ($(TORCH)) into $(VENV)"
	@if ls $(VENV)/.torch-* >/dev/null 2>&1; then $(PIP) uninstall -y torch; rm -f $(VENV)/.torch-*; fi
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_REQUIREMENT)" || { \
	  echo "PyTorch's $(TORCH) build was not found: name an index that has it, make install TORCH_INDEX=URL (see pytorch.org/get-started), or take the CUDA build, make install TORCH=cuda"; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch-$(TORCH) pyproject.toml
	@echo "installing i3lm into $(VENV)"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what tests need into $(VENV)"
	@$(PIP) install -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

quickstart: install
	$(VENV)/bin/i3lm quickstart --output runs/quickstart --overwrite

# Tests run in so many processes of one thread each: threads of several would wait for each other.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not gpu and not network" $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m "not gpu and not network" --timeout=3600 $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
