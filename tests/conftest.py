"""Makes helpers beside the tests importable, and gin's configuration clean for every test."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "tools"))


@pytest.fixture(autouse=True)
def _clean_gin():
    """Gin's configuration is global: every test starts and ends without one."""
    import gin

    gin.clear_config()
    yield
    gin.clear_config()
