"""Tests of topologies; those that need libtpu or the CUDA compiler are skipped without it."""

import importlib.util
import subprocess
import sys

import jax
import jaxlib
import numpy as np
import pytest

from diffusion_t5x.runtime.partitioning import PjitPartitioner
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
        ("v5:4x4", "'v5:4x4' has an unknown TPU generation or NVIDIA card, 'v5'; did you mean 'v5"),
        ("v5p:4x4", "expected 3 sizes, such as 'v5p:4x4x8'"),
        ("v5e:2x2x4", "expected 2 sizes, such as 'v5e:4x4'"),
        ("v5p:2x0x4", "does not name a slice of v5p"),
        ("v5p", "does not name a slice of v5p"),
        ("h900:1x8", "NVIDIA card, 'h900'; did you mean 'h[12]00'.*Known: v4.*b200.*'h100:2x8'"),
        ("h100:8", "does not name hosts x cards of h100: expected 2 sizes, such as 'h100:1x8'"),
        ("h100:0x8", "does not name hosts x cards of h100"),
        ("h100:1x8x1", "does not name hosts x cards of h100"),
        ("b200", "expected 2 sizes, such as 'b200:1x8'"),
    ],
)
def test_a_wrong_topology_is_an_error_that_says_what_was_expected(topology, says):
    with pytest.raises(ValueError, match=says):
        topologies.devices(topology)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"libtpu.*pip install 'diffusion_t5x\[tpu\]'"):
        topologies.devices("v5p:2x2x4")


def _missing(package):
    raise topologies.metadata.PackageNotFoundError(package)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (_missing, "jax-cuda13-plugin is not installed"),
        (lambda package: "0.1.2", "jax-cuda13-pjrt is 0.1.2; expected"),
    ],
    ids=["absent", "of another jax"],
)
def test_without_jaxs_own_cuda_compiler_the_error_says_what_to_install(monkeypatch, version, says):
    monkeypatch.setattr(topologies.metadata, "version", version)
    with pytest.raises(
        RuntimeError, match=rf"{says}.*pip install 'diffusion_t5x\[cuda-compiler\]'"
    ):
        topologies.devices("h100:2x8")


def test_without_nvidias_assembler_the_error_comes_before_xla_ends_the_process(monkeypatch):
    monkeypatch.setattr(topologies.metadata, "version", lambda package: jaxlib.__version__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(topologies.pathlib.Path, "exists", lambda path: False)
    with pytest.raises(RuntimeError, match=r"bin/ptxas is nowhere in /usr/local/cuda;.*libdevice"):
        topologies.devices("a100:1x8")


class _Absent:
    platform, device_kind, client = "gpu", "NVIDIA H100 80GB HBM3", None


def test_options_of_absent_cards_give_way_to_the_users_own(monkeypatch):
    triton, level = "xla_gpu_enable_triton_gemm", "xla_gpu_autotune_level"
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert topologies.compiler_options(_Absent()) == {triton: False, level: 0}
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x --{triton}=true")
    assert topologies.compiler_options(_Absent()) == {level: 0}
    assert topologies.compiler_options(jax.devices("cpu")[0]) == {}


def _has_cuda_compiler():
    try:
        topologies._require_cuda_compiler("h100:1x1")
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not _has_cuda_compiler(), reason="needs the CUDA compiler")
@pytest.mark.parametrize("name", topologies.CARDS)
def test_the_compiler_takes_each_card(name):
    cards = topologies.devices(f"{name}:2x4")
    assert [card.process_index for card in cards] == [0] * 4 + [1] * 4
    assert {card.device_kind for card in cards} == {topologies.CARDS[name].kind}
    mesh = jax.sharding.Mesh(cards, ("data",))
    x = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
    options = topologies.compiler_options(cards[0])
    compiled = jax.jit(lambda x: x.sum(0)).lower(x).compile(compiler_options=options)
    assert "all-reduce" in compiled.as_text()


@pytest.mark.skipif(not _has_cuda_compiler(), reason="needs the CUDA compiler")
def test_meshes_over_hosts_of_cards_have_neighbours_within_a_host():
    cards = topologies.devices("h100:2x4")
    split = PjitPartitioner(2, devices=cards).mesh
    assert dict(split.shape) == {"data": 4, "model": 2}
    for mesh in (split, PjitPartitioner(4, devices=cards).mesh):
        assert all(len({card.process_index for card in row}) == 1 for row in mesh.devices)
    hosts = PjitPartitioner(devices=cards, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(2, 1, 1)).mesh
    for index, host in enumerate(hosts.devices):
        assert {card.process_index for card in host.flat} == {index}
    with pytest.raises(ValueError, match=r"dcn_mesh_shape.*2 processes.*such as \(2, 1, 1\)"):
        PjitPartitioner(devices=cards, ici_mesh_shape=(1, 2, 2), dcn_mesh_shape=(4, 1, 1))


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
