"""How the course's tests set JAX, and how they show an exercise that is not written yet."""

import os
from pathlib import Path

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


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """An exercise that is not written yet is one line, not a traceback."""
    outcome = yield
    error = call.excinfo and call.excinfo.value
    if isinstance(error, NotImplementedError) and "EXERCISE" in str(error):
        frame = call.excinfo.traceback[-1]
        place = f"{Path(str(frame.path)).name}:{frame.lineno + 1}"
        outcome.get_result().longrepr = f"{error} is not written yet: {place}"
