# make          environment, then sft.py, reward.py, ppo.py on the embedded data, and a table
# make all      the same and dpo.py, grpo.py, iterative_dpo.py, and the table of them all
# make test     environment, then lint and tests
# make clean    removes runs/ and the environments
#
# Each stage is run with --resume: a stopped `make` goes on, a finished stage is not repeated.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# XLA's CPU backend takes fresh memory at every call; in huge pages (Linux, glibc 2.35 or newer)
# that costs less time. Elsewhere the variable is not read.
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
# Compiled programs are kept, so that a second run starts faster.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

all-three: three-stages
	$(RUN) evaluate.py --no-frontier

all: three-stages
	$(RUN) dpo.py --resume
	$(RUN) grpo.py --resume
	$(RUN) iterative_dpo.py --resume
	$(RUN) evaluate.py --models $(foreach x,ppo dpo grpo iterative_dpo,runs/$(x)/model)

three-stages: $(VENV)/ready
	$(RUN) sft.py --resume
	$(RUN) reward.py --resume
	$(RUN) ppo.py --resume

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

test: $(VENV)/ready $(VENV)/ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(RUN) tests/sync_blocks.py
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

$(VENV)/ready-dev: requirements-dev.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf runs $(VENV) .jax_cache

.PHONY: all-three all three-stages test clean
