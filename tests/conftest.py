"""Makes tools beside the tests importable, compilation cheap, and gin's configuration clean."""

import gc
import os
import pathlib
import signal
import sys
import tempfile

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "tools"))

# Compilation is most of a test's time. XLA optimises less, here and in the processes that tests
# start, and what one test compiles serves the next. Without its newer code generator for fusions a
# training step compiles in less than half of the time.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


# What was started in the background ignores Ctrl-C, and so would the commands that tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Sets up one cache of compiled functions for all test processes, and removes it at the end."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="diffusion_t5x_tests_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        config.add_cleanup(cache.cleanup)


# The files whose tests take longest. Started last, one process would wait for another's.
LONGEST = (
    "test_readme.py", "test_loop.py", "test_datasets.py", "test_models.py",
    "test_partitioning.py", "test_networks.py", "test_nonfinite.py", "test_flags.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Puts the longest files first."""
    names = (*LONGEST, None)
    items.sort(key=lambda item: names.index(item.path.name if item.path.name in names else None))


def pytest_collection_finish():
    """Exempts what the imports made from garbage collection, else a tenth of all that is done.

    Tracing and AutoGraph make so many objects that the whole heap would be searched every second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _clean_gin():
    """Gin's configuration is global: every test starts and ends without one."""
    import gin

    gin.clear_config()
    yield
    gin.clear_config()
