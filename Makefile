# `make help` lists the targets. Each stage of training is run with --resume: a stopped `make` goes
# on where it was, and a finished stage is not repeated.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# XLA's CPU backend takes fresh memory at every call; in huge pages (Linux, glibc 2.35 or newer)
# that costs less time. Elsewhere the variable is not read.
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
# Compiled programs are kept, so that a second run starts faster.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

# Two test files side by side; the functions of one file stay together.
PYTEST = $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

all-three: three-stages  ## environment, sft.py, reward.py, ppo.py, and a table
	$(RUN) evaluate.py --no-frontier

all: three-stages  ## the same, then dpo.py, grpo.py, iterative_dpo.py, and the table of them all
	$(RUN) dpo.py --resume
	$(RUN) grpo.py --resume
	$(RUN) iterative_dpo.py --resume
	$(RUN) evaluate.py --models $(foreach x,ppo dpo grpo iterative_dpo,runs/$(x)/model)

three-stages: $(VENV)/ready
	$(RUN) sft.py --resume
	$(RUN) reward.py --resume
	$(RUN) ppo.py --resume

results: $(VENV)/ready-dev  ## every algorithm at several KL coefficients and seeds: hours, writes results/
	$(RUN) benchmarks/results.py

env: $(VENV)/ready  ## the environment alone, in .venv

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@
	@echo "environment ready; for python ... lines in this shell: source $(VENV)/bin/activate"

$(VENV)/ready-dev: requirements-dev.txt requirements.txt | $(VENV)/ready
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

smoke: $(VENV)/ready  ## every script once, on a tiny model, in runs/demo (under two minutes)
	PATH="$(abspath $(VENV))/bin:$$PATH" recipes/demo.sh

check: $(VENV)/ready-dev  ## format, lint, and that shared functions are equal copies
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(RUN) tests/sync_blocks.py

test: check  ## check, and the tests that are quick
	$(PYTEST) -m "not slow"

test-most: check  ## check, and all tests but the longest: what CI runs
	$(PYTEST) -m "not long"

test-all: check  ## check, and all tests
	$(PYTEST)

tensorboard: $(VENV)/ready  ## TensorBoard on runs/; it is installed first where it is absent
	test -x $(VENV)/bin/tensorboard || \
	  $(VENV)/bin/pip install --quiet --disable-pip-version-check tensorboard
	$(VENV)/bin/tensorboard --logdir runs

clean:  ## removes caches; runs/, with its trained models, and the environments stay
	rm -rf .jax_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +

distclean: clean  ## removes runs/ and the environments, too
	rm -rf runs $(VENV) .venv-metal

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {sub("all-three", "", $$1); \
	  printf "make %-12s %s\n", $$1, $$2}' Makefile

.PHONY: all-three all three-stages results env smoke check test test-most test-all tensorboard clean distclean help
