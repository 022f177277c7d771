"""Dry runs: the memory they report, the settings they name, and the devices they compile for."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import toy

import gin
from diffusion_t5x import gin_utils, train
from diffusion_t5x.runtime.partitioning import PjitPartitioner, standard_logical_axis_rules
from diffusion_t5x.runtime.train_state import abstract_train_state
from diffusion_t5x.training import dry_run, optimizers, topologies
from diffusion_t5x.training.train_step import Trainer

FEATURES = (
    "encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens", "decoder_loss_weights"
)  # fmt: skip
GIB = dry_run.GIB


def _step(model=None, batch_size=8, length=6, devices=1, partitions=1, dims=1, **settings):
    """A trainer, and shapes of its state and batch."""
    model = model or toy.model("autoregressive")
    rules = standard_logical_axis_rules(1, dims)
    partitioner = PjitPartitioner(partitions, rules, devices=jax.devices()[:1] * devices)
    shapes, kinds = dict.fromkeys(FEATURES, (1, length)), dict.fromkeys(FEATURES, np.int32)
    state = abstract_train_state(model, partitioner, shapes, kinds)
    trainer = Trainer(model, partitioner, state, 0, lambda step: 0.1, **settings)
    return trainer, state, dry_run.abstract_batch(trainer, batch_size, shapes, kinds)


def test_the_sizes_of_a_report_are_those_of_the_arrays():
    model = toy.model("autoregressive", optimizer=optimizers.adamw())
    report = dry_run.compile_step(*_step(model))
    count = toy.VOCAB_SIZE * 16 + 4 * 16 * 16 + 3 * 16 * 16 + 3 * 16 + 4 * 32
    assert report.parameter_count == count
    assert report.parameters == 4 * count
    # Two moments of each parameter; the step, and the optimiser's count of them.
    assert report.optimizer == 2 * 4 * count + 2 * 4
    assert report.batch == len(FEATURES) * 8 * 6 * 4
    # The new state takes the place of the old.
    held = report.parameters + report.optimizer + report.batch + report.temporaries
    assert held <= report.total < held + 10_000
    assert report.temporaries > 0
    assert (report.limit, report.fits) == (None, True)


def test_a_state_larger_than_this_machine_is_compiled_for_since_nothing_is_allocated():
    # 64 GiB of parameters, and twice as much of Adam's moments.
    model = toy.model("autoregressive", vocab_size=2**30)
    report = dry_run.compile_step(*_step(model, batch_size=1))
    assert report.parameters > 64 * GIB
    assert report.total > 192 * GIB


REPORT = dry_run.Report(
    device="TPU v5", mesh={"data": 4, "model": 2}, parameter_count=1234, parameters=3 * GIB,
    optimizer=GIB // 2, batch=0, temporaries=2 * GIB, total=6 * GIB, limit=95 * GIB, refusal=None,
)  # fmt: skip


def test_lines_say_each_size_and_whether_it_fits():
    text = "\n".join(REPORT.lines())
    assert "mesh: {'data': 4, 'model': 2} of TPU v5" in text
    sizes = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in text.splitlines()}
    assert (sizes["parameters"], sizes["optimiser"], sizes["total"]) == ("3.000", "0.500", "6.000")
    assert sizes["activations and temporaries"] == "2.000"
    assert sizes["left"] == "89.000"
    assert text.endswith("\nfits")
    larger = dataclasses.replace(REPORT, total=95 * GIB + 1)
    assert list(larger.lines())[-1] == "does not fit"
    refused = dataclasses.replace(REPORT, total=None, temporaries=None, refusal="Used 99G of 95G")
    assert not refused.fits
    assert "the compiler refuses: Used 99G of 95G" in list(refused.lines())


SETTINGS = [
    "config.TransformerConfig.remat=full",
    "partitioning.standard_logical_axis_rules.parameter_partitioning_dims=2",
    "trainer.Trainer.num_microbatches=2",
    "partitioning.PjitPartitioner.num_partitions=2",
]


def _named(monkeypatch, capsys, network=None, **kwargs):
    """The settings that a step that does not fit is answered with."""
    monkeypatch.setattr(
        dry_run, "compile_step", lambda *args: dataclasses.replace(REPORT, total=96 * GIB)
    )
    with pytest.raises(dry_run.DoesNotFit) as error:
        dry_run.check(*_step(toy.model("autoregressive", **(network or {})), devices=4, **kwargs))
    assert error.value.code == 1
    assert error.value.report.total == 96 * GIB
    text = capsys.readouterr().out
    assert "does not fit\nsettings that need less memory:\n" in text
    return re.findall(r"--gin\.(\S+)", text)


def test_a_step_that_does_not_fit_is_answered_with_the_settings_that_are_not_in_use(
    monkeypatch, capsys
):
    assert _named(monkeypatch, capsys) == SETTINGS
    # Recomputed already, split already, one example per device, one model over all devices.
    assert not _named(monkeypatch, capsys, {"remat": "full"}, dims=2, batch_size=1, partitions=4)
    # Numbers are double those of the run.
    twice = _named(monkeypatch, capsys, batch_size=16, partitions=2, num_microbatches=2)
    assert twice[-2:] == [
        "trainer.Trainer.num_microbatches=4", "partitioning.PjitPartitioner.num_partitions=4"
    ]  # fmt: skip


def test_the_settings_that_are_named_can_be_set():
    run = ["models/tiny.gin", "objectives/diffusion.gin", "runs/pretrain.gin"]
    data = ["MIXTURE_OR_TASK_NAME=x", "MODEL_DIR=x", "TASK_FEATURE_LENGTHS={'targets': 8}"]
    gin_utils.parse_config(run, [*data, *SETTINGS])


def test_what_a_compiler_refuses_is_reported_and_other_errors_are_not():
    class Lowered:
        def __init__(self, message):
            self.message = message

        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(self.message)

    trainer, state, batch = _step()
    trainer.metric_shapes = lambda *args: {}
    refuse = "RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 20.1G of 15.7G hbm.\n\nTotal: ..."
    trainer.step = types.SimpleNamespace(lower=lambda *args: Lowered(refuse))
    report = dry_run.compile_step(trainer, state, batch)
    assert report.refusal == "Ran out of memory in hbm. Used 20.1G of 15.7G hbm."
    assert not report.fits
    trainer.step = types.SimpleNamespace(lower=lambda *args: Lowered("INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        dry_run.compile_step(trainer, state, batch)


def test_memory_is_that_of_the_chip_or_what_the_device_says():
    class Device:
        device_kind = "TPU v5 lite"

    class Present:
        device_kind = "a GPU"

        def memory_stats(self):
            return {"bytes_limit": 123}

    class Absent:
        def __init__(self, kind):
            self.device_kind = kind

        def memory_stats(self):
            raise jax.errors.JaxRuntimeError("only for addressable devices")

    # Of 79.1 GiB that CUDA reports, one is its own.
    assert dry_run.device_memory(Absent("NVIDIA H100 80GB HBM3")) == pytest.approx(78.1 * GIB)
    assert dry_run.device_memory(Absent("NVIDIA T4")) is None
    assert dry_run.device_memory(Device()) == 16 * GIB
    assert dry_run.device_memory(Present()) == 123
    assert dry_run.device_memory(jax.devices("cpu")[0]) is None


COMMAND = [
    "--gin_file=models/tiny.gin", "--gin_file=objectives/autoregressive.gin",
    "--gin_file=runs/pretrain.gin", "--gin.MIXTURE_OR_TASK_NAME=toy_copy",
    "--gin.MIXTURE_OR_TASK_MODULE=toy", "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 6}",
    "--gin.vocabularies.get_vocabulary.name=bytes", "--gin.vocabularies.get_vocabulary.extra_ids=0",
    "--gin.config.TransformerConfig.num_layers=1", "--gin.BATCH_SIZE=8", "--gin.TRAIN_STEPS=2",
]  # fmt: skip


def test_a_topology_gives_the_devices_that_the_step_is_compiled_for(tmp_path, monkeypatch):
    chosen, here = [], jax.devices()[:1]

    def describe(topology):
        chosen.append(topology)
        return types.SimpleNamespace(devices=here)

    monkeypatch.setattr(topologies, "_describe", describe)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "devices", lambda *args: pytest.fail("looked for devices here"))
    toy.register()
    report = train.main(
        [*COMMAND, f"--gin.MODEL_DIR={tmp_path}/run", "--dry_run", "--topology=v5p:2x2x1"]
    )
    assert set(chosen) == {"v5p:2x2x1"}
    assert report.mesh == {"data": 1, "model": 1}
    assert not (tmp_path / "run").exists()


def test_a_topology_without_a_dry_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train.main([*COMMAND, f"--gin.MODEL_DIR={tmp_path}", "--topology=v5p:2x2x1"])
    assert error.value.code == 2
    assert "--topology=v5p:2x2x1 is for --dry_run" in capsys.readouterr().err


def test_without_libtpu_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"v5p:2x2x1.*pip install 'diffusion_t5x\[tpu\]'"):
        train.main([*COMMAND, f"--gin.MODEL_DIR={tmp_path}", "--dry_run", "--topology=v5p:2x2x1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "kind", "partitions"),
    [("h100:2x4", "NVIDIA H100 80GB HBM3", 1), ("a100:2x2", "NVIDIA A100-SXM4-80GB", 2)],
)
def test_the_step_is_compiled_for_nvidia_cards_without_having_one(
    tmp_path, topology, kind, partitions
):
    try:
        topologies._require_cuda_compiler(topology)
    except RuntimeError as error:
        pytest.skip(str(error))
    command = [*COMMAND, f"--gin.MODEL_DIR={tmp_path}/run", "--dry_run", f"--topology={topology}"]
    command.append(f"--gin.partitioning.PjitPartitioner.num_partitions={partitions}")
    toy.register()
    report = train.main(command)
    devices = int(np.prod([int(size) for size in topology.partition(":")[2].split("x")]))
    assert report.mesh == {"data": devices // partitions, "model": partitions}
    assert report.device == kind
    assert report.fits
    assert report.collectives.results["all-reduce"] > 0
    assert not report.collectives.at_least


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_step_is_compiled_for_tpus_without_having_one(tmp_path):
    command = [*COMMAND, f"--gin.MODEL_DIR={tmp_path}/run", "--dry_run", "--topology=v5e:2x2"]
    tests = toy.__file__.rpartition("/")[0]
    program = f"import sys; sys.path.insert(0, {tests!r}); import toy; toy.register(); "
    program += "from diffusion_t5x import train; "
    run = subprocess.run(
        [sys.executable, "-c", program + f"train.main({command!r})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "mesh: {'data': 4, 'model': 1} of TPU v5 lite" in run.stdout
    assert run.stdout.splitlines()[-1] == "fits"


def test_the_documented_commands_parse():
    text = (pathlib.Path(__file__).parents[2] / "docs/pods.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m diffusion_t5x.train ((?:.*\\\n)+.*)", text)
    assert len(commands) == 4
    for command in commands:
        gin.clear_config()
        flags = [flag for flag in shlex.split(command) if flag.startswith("--gin")]
        files = [flag.partition("=")[2] for flag in flags if flag.startswith("--gin_file")]
        bindings = [flag.removeprefix("--gin.") for flag in flags if flag.startswith("--gin.")]
        gin_utils.parse_config(files, bindings)
