"""Tests of TPU topologies; those that need libtpu are skipped without it."""

import importlib.util
import subprocess
import sys

import pytest

from diffusion_t5x.training import topologies


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5p:2x2x4", "v5p-32"),
        ("v4:2x2x1", "v4-8"),
        ("v5e:4x4", "v5litepod-16"),
        ("v6e:8x8", "v6e-64"),
    ],
)
def test_accelerators_count_the_cores_of_a_generation(topology, expected):
    assert topologies.accelerator_type(topology) == expected


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("v5:4x4", "'v5:4x4' has an unknown TPU generation, 'v5'; did you mean 'v5"),
        ("v5p:4x4", "expected 3 sizes, such as 'v5p:4x4x8'"),
        ("v5e:2x2x4", "expected 2 sizes, such as 'v5e:4x4'"),
        ("v5p:2x0x4", "does not name a slice of v5p"),
        ("v5p", "does not name a slice of v5p"),
    ],
)
def test_a_wrong_topology_is_an_error_that_says_what_was_expected(topology, says):
    with pytest.raises(ValueError, match=says):
        topologies.devices(topology)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"libtpu.*pip install 'diffusion_t5x\[tpu\]'"):
        topologies.devices("v5p:2x2x4")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("topology", "kind"),
    [("v5p:2x2x4", "TPU v5"), ("v4:2x2x4", "TPU v4"), ("v5e:4x4", "TPU v5 lite")],
)
def test_devices_are_the_chips_of_the_slice(topology, kind):
    program = (
        f"from diffusion_t5x.training import topologies; chips = topologies.devices({topology!r}); "
        "print(chips.shape, chips[0].platform, chips[0].device_kind)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == f"(16,) tpu {kind}"
