# The newcomer's door. All else is doit's: .venv/bin/doit list
SHELL := /bin/bash
PYTHON_BIN := .venv/bin/python
DOIT := .venv/bin/doit
# Moves lock entries that have left the Debian archive, and says which.
HEAL := $(DOIT) heal
BENCH := $(PYTHON_BIN) -m benchmarks

.PHONY: all setup test lint docs doctor bench sabotage relock clean help
.NOTPARALLEL:

all: setup ## set up this machine, then build and prove the default platform
	$(HEAL)
	$(DOIT)

setup: ## only what this machine lacks: Debian packages, .venv, a running container engine
	@scripts/setup make

test: ## set up, then run the tests
	@scripts/setup test
	$(PYTHON_BIN) -m pytest

lint: ## ruff, mypy, import-linter, shellcheck, shfmt, codespell
	@scripts/setup lint
	@scripts/lint

docs: ## these pages as a site, checked: artifacts/docs/index.html
	@scripts/setup docs
	rm -rf artifacts/docs
	$(PYTHON_BIN) -m sphinx -q -E -n -W --keep-going -d artifacts/docs/.doctrees docs artifacts/docs
	rm -rf artifacts/docs/.doctrees

doctor: ## what is here, what is missing, what to do
	@scripts/doctor

bench: ## compare with plain doit, make, cp, reprepro and createrepo_c; writes benchmarks/results.md
	@scripts/setup test
	$(BENCH)

sabotage: ## break things in the lab, which has to say so; three runs of ten minutes, NAMES="a b+c" for others
	@scripts/setup make
	$(PYTHON_BIN) -m tests.sabotage $(NAMES)

relock: ## write the Python locks anew from pyproject.toml; UPGRADE=1 moves every version
	@scripts/setup make
	scripts/relock $(if $(UPGRADE),--upgrade)

clean: ## remove artifacts/, but not what you edited there; caches stay (doit gc)
	[ ! -d artifacts ] || find artifacts -mindepth 1 -maxdepth 1 ! -name .edited -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' Makefile
