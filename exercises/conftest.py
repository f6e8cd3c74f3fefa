"""How the course's tests set JAX, and how they show an exercise that is not written yet."""

import os
from pathlib import Path

import numpy as np
import pytest


def pytest_configure(config):
    """Sets JAX before it is imported: the CPU, exact products, eight simulated devices."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    flags = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
    os.environ["XLA_FLAGS"] = flags.strip()
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiled sooner, runs slower
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def start_random_numbers(item):
    """A test's random numbers do not depend on which tests ran before it."""
    if hasattr(item.module, "RNG"):
        item.module.RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    start_random_numbers(item)  # for the fixtures


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    start_random_numbers(pyfuncitem)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """An exercise that is not written yet is one line, not a traceback."""
    outcome = yield
    error = call.excinfo and call.excinfo.value
    if isinstance(error, NotImplementedError) and "EXERCISE" in str(error):
        frame = call.excinfo.traceback[-1]
        place = f"{Path(str(frame.path)).name}:{frame.lineno + 1}"
        outcome.get_result().longrepr = f"{error} is not written yet: {place}"
