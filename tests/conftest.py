"""What all tests share: where the scripts are, how JAX is set, golden numbers, error messages."""

import functools
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    """Sets JAX by environment variables, before it is imported, and so for started scripts too.

    Compiled functions are kept in pytest's cache folder, which git ignores: a second run is faster.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    # Eight simulated devices, for sharded.py; the other scripts use the first.
    flags = ["--xla_force_host_platform_device_count=8"]
    # Less optimised code, which is compiled in a third of the time; see the README, Tests.
    flags += ["--xla_backend_optimization_level=0"]
    if not version("jax").startswith("0.5."):  # which does not know it
        flags += ["--xla_cpu_use_fusion_emitters=false"]
    flags += [os.environ.get("XLA_FLAGS", "")]  # what is set already stands last, and wins
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    if getattr(config, "cache", None):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_collection_modifyitems(items):
    """The longest file first: where files run side by side, the others do not end before it."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name != "test_sharded.py")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """A compiled function holds memory maps, and a Linux process may have 65 530 of them."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(autouse=True)
def keep_signals():
    """A run sets its own handlers of Ctrl-C and SIGTERM; here they must not outlive the run."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def goldens():
    """goldens("sft") -> the arrays of tests/goldens/sft.npz, by name."""

    @functools.cache
    def load(name):
        with np.load(ROOT / "tests" / "goldens" / f"{name}.npz") as file:
            return dict(file)

    return load


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data, which is not part of the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture
def float64():
    """64-bit floats for one test; the context manager has moved between versions of JAX."""
    import jax

    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:
        from jax.experimental import enable_x64

        context = enable_x64(True)
    with context:
        yield


@pytest.fixture
def error_line(capsys):
    """error_line(f, *args) -> the one line that f(*args) ends with, exit status 2 checked.

    With traceback_of, a traceback of that file, the user's own, stands before it.
    """

    def call(function, *args, traceback_of=None):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args)
        *before, message = capsys.readouterr().err.splitlines(True)
        assert stop.value.code == 2
        assert message.startswith("error: ") and message.endswith("\n"), message
        assert bool(before) == bool(traceback_of), before
        assert not before or str(traceback_of) in "".join(before)
        return message

    return call
