SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check

SEED ?= 0
# REQUIREMENTS=cpu or cuda overrides the choice by `nvidia-smi -L`; scripts/setup.sh remembers it.
export REQUIREMENTS

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make quickstart SEED=7       another seed (default 0), into runs/quickstart-7/"
	@echo "  make setup REQUIREMENTS=cpu  or cuda; without it, chosen by whether there is an NVIDIA GPU"
	@echo "  make test ARGS='-k pool'     arguments for pytest"

setup:  ## make .venv with the pinned packages and groupzero in it; skips what is done
	@scripts/setup.sh

quickstart: setup  ## train a small policy to reason, on this machine
	@.venv/bin/groupzero train configs/quickstart.toml seed=$(SEED)

test: setup  ## run the tests, two files at a time
	@.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

check: setup  ## ruff (rules, format) and the type checker
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/basedpyright
