# `make demo` converts the shipped teacher, `make test` runs the tests. Both install their requirements into .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
RELEASES_STAMP := .venv-transformers/.installed
PROCESSES ?= 3
# Without a GPU: the index of CPU wheels that PyTorch's installation page names, which spares gigabytes of GPU libraries.
TORCH_INDEX ?=
TORCH_FIRST = $(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --constraint constraints.txt --index-url $(TORCH_INDEX) torch)
# Into its own .venv Python may write bytecode: without it, each of the processes that tests start compiles torch anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo install test drill lint style types docs services-down clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'radlads needs Python 3.11 or newer; set PYTHON=python3.x' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo 'could not create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(TORCH_FIRST)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable .
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(TORCH_FIRST)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(STAMP)

$(RELEASES_STAMP): $(DEV_STAMP) tests/releases.py
	rm -rf $(@D)
	$(BIN)/python tests/releases.py
	@touch $@

demo: $(STAMP)  ## Convert the shipped teacher end to end, with the Prefect and MLflow pages on loopback
	$(BIN)/radlads demo

install: $(DEV_STAMP) $(RELEASES_STAMP)  ## What tests need, into .venv and .venv-transformers

test: install  ## All tests that need no GPU, in three processes (PROCESSES=n for others)
	$(BIN)/python -m pytest -n $(PROCESSES) --durations=20

drill: $(DEV_STAMP)  ## Test recovery: random kill -9, network faults, server outages, two hosts, Slurm; about 25 minutes
	$(BIN)/python benchmarks/drill.py --kills 25 --seed 0 --out benchmarks/results/drill.md

lint: style types docs  ## Style, types of the control plane, and the pages of docs/

style: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP)
	@mkdir -p .typecheck && ln -sfn .. .typecheck/radlads
	MYPYPATH=.typecheck $(BIN)/mypy -p radlads.tasks -p radlads.flows

docs: $(DEV_STAMP)  ## docs/ as a site with search, in site/; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

services-down: $(STAMP)  ## Stop the Prefect server, its worker and the MLflow server
	$(BIN)/radlads services down

clean:  ## Remove caches; keeps .venv and .radlads (your runs)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .typecheck build site *.egg-info
