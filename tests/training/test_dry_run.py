"""Dry runs: what they report, what they advise where a step does not fit, and for which devices."""

import dataclasses
import functools
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
from diffusion_t5x.training import dry_run, optimizers, topologies
from diffusion_t5x.training.train_step import Trainer

FEATURES = (
    "encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens", "decoder_loss_weights"
)  # fmt: skip
GIB = dry_run.GIB


def _job(model=None, batch_size=8, length=6, devices=1, **kwargs):
    return dry_run.Job(
        model or toy.model("autoregressive"),
        PjitPartitioner(devices=jax.devices()[:1] * devices),
        functools.partial(Trainer, learning_rate_fn=lambda step: 0.1),
        batch_size,
        dict.fromkeys(FEATURES, (1, length)),
        dict.fromkeys(FEATURES, np.int32),
        **kwargs,
    )


def test_the_parts_of_a_report_are_what_the_arrays_take():
    report = dry_run.compile_step(_job(toy.model("autoregressive", optimizer=optimizers.adamw())))
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
    assert (report.limit, report.fits, report.collectives) == (None, True, {})


def test_a_state_larger_than_this_machine_is_compiled_for_since_nothing_is_allocated():
    # 64 GiB of parameters, and twice as much of Adam's moments.
    report = dry_run.compile_step(_job(toy.model("autoregressive", vocab_size=2**30), batch_size=1))
    assert report.parameters > 64 * GIB
    assert report.total > 192 * GIB


def test_lines_say_each_size_and_whether_it_fits():
    report = dry_run.Report(
        device="TPU v5", mesh={"data": 4, "model": 2}, parameter_count=1234, parameters=3 * GIB,
        optimizer=GIB // 2, batch=0, temporaries=2 * GIB, total=6 * GIB, limit=95 * GIB,
        collectives={"all-reduce": (12, 5 * GIB)}, seconds=0.25, refusal=None, changed={},
    )  # fmt: skip
    text = "\n".join(report.lines())
    assert "mesh: {'data': 4, 'model': 2} of TPU v5" in text
    sizes = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in text.splitlines()}
    assert (sizes["parameters"], sizes["optimiser"], sizes["total"]) == ("3.000", "0.500", "6.000")
    assert sizes["activations and temporaries"] == "2.000"
    assert "all-reduce: 12 per step, 5.000 GiB" in text
    assert text.endswith("less collectives: 0.25\nfits")
    larger = dataclasses.replace(report, total=95 * GIB + 1)
    assert list(larger.lines())[-1] == "does not fit"
    refused = dataclasses.replace(report, total=None, temporaries=None, refusal="Used 99G of 95G")
    assert not refused.fits
    assert "the compiler refuses: Used 99G of 95G" in list(refused.lines())


def _report(total=1, state=1, changed=None):
    """Of a device that holds 10 bytes."""
    return dry_run.Report(
        "fake", {}, 0, state, 0, 0, 0, total, 10, {}, None, None, dict(changed or {})
    )


def _fake_compiler(monkeypatch, fits, state=1):
    """Steps fit if `fits` says so of the changed settings; those tried are returned as they are."""
    tried = []

    def compile_step(job):
        tried.append(dict(job.changed))
        return _report(1 if fits(job.changed) else 11, state, job.changed)

    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    return tried


def test_settings_that_need_less_are_tried_one_added_to_the_other(monkeypatch, capsys):
    tried = _fake_compiler(monkeypatch, lambda changed: changed.get(dry_run.PARTITIONS) == 2)
    with pytest.raises(dry_run.DoesNotFit) as error:
        dry_run.check(_job(devices=4))
    # Eight examples on four devices can be halved once.
    assert [list(changed.items())[-1:] for changed in tried] == [
        [], [(dry_run.REMAT, "full")], [(dry_run.DIMENSIONS, 2)], [(dry_run.MICROBATCHES, 2)],
        [(dry_run.PARTITIONS, 2)],
    ]  # fmt: skip
    assert error.value.code == 1
    assert error.value.report.changed == {}
    assert error.value.remedy.changed == tried[-1]
    assert len(tried[-1]) == 4
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith(
            "--gin.config.TransformerConfig.remat=full "
            "--gin.partitioning.standard_logical_axis_rules.parameter_partitioning_dims=2 "
            "--gin.train_step.Trainer.num_microbatches=2 "
            "--gin.partitioning.PjitPartitioner.num_partitions=2"
        )
    )


def test_a_state_that_is_most_of_the_memory_is_split_first(monkeypatch):
    tried = _fake_compiler(monkeypatch, lambda changed: changed != {}, state=6)
    with pytest.raises(dry_run.DoesNotFit) as error:
        dry_run.check(_job(devices=4))
    assert tried == [{}, {dry_run.DIMENSIONS: 2}]
    assert error.value.remedy.changed == tried[-1]


def test_where_nothing_helps_that_is_said(monkeypatch, capsys):
    _fake_compiler(monkeypatch, lambda changed: False)
    with pytest.raises(dry_run.DoesNotFit) as error:
        dry_run.check(_job())
    assert error.value.remedy is None
    assert "none of these settings fits" in capsys.readouterr().out


def test_changed_settings_are_those_of_the_job_that_is_compiled():
    changed = {}
    for job in dry_run._smaller(_job(devices=8, batch_size=64, num_microbatches=2), _report()):
        new = [name for name in job.changed if name not in changed]
        changed[new[0] if new else dry_run.MICROBATCHES] = job
    assert changed[dry_run.REMAT].model.module.config.remat == "full"
    assert toy.model().module.config.remat == "none"
    rules = changed[dry_run.DIMENSIONS].partitioner.logical_axis_rules
    assert set(rules) == set(standard_logical_axis_rules(1, 2))
    assert changed[dry_run.PARTITIONS].partitioner.mesh.shape["model"] == 2
    # The run's own number is what is doubled.
    assert (job.changed[dry_run.MICROBATCHES], job.num_microbatches) == (8, 8)
    assert job.partitioner.mesh.shape == {"data": 2, "model": 4}
    state = dry_run.abstract_train_state(job.model, job.partitioner, job.shapes, job.types)
    assert job.trainer(state).num_microbatches == 8
    with pytest.raises(ValueError, match="num_microbatches = 8 does not divide the 4 examples"):
        dataclasses.replace(job, batch_size=8).trainer(state)


def test_recomputing_makes_a_step_fit_that_did_not(monkeypatch, capsys):
    network = {"num_layers": 3, "mlp_dim": 256, "scan_layers": True}
    job = _job(toy.model("autoregressive", **network), length=64)
    plain = dry_run.compile_step(job).total
    monkeypatch.setattr(dry_run, "device_memory", lambda device: int(plain * 0.9))
    with pytest.raises(dry_run.DoesNotFit) as error:
        dry_run.check(job)
    assert error.value.report.total == plain
    assert error.value.remedy.changed == {dry_run.REMAT: "full"}
    assert error.value.remedy.total <= plain * 0.9
    text = capsys.readouterr().out
    assert "does not fit\nfits" in text


def test_what_a_compiler_refuses_is_reported_and_other_errors_are_not(monkeypatch):
    class Lowered:
        def __init__(self, message):
            self.message = message

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    refuse = "RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 20.1G of 15.7G hbm.\n\nTotal: ..."
    job = _job()
    for message in (refuse, "INTERNAL: something else"):
        lowered = types.SimpleNamespace(lower=lambda *args, m=message: Lowered(m))
        trainer = types.SimpleNamespace(step=lowered, metric_shapes=lambda *args: {})
        monkeypatch.setattr(dry_run.Job, "trainer", lambda self, state, t=trainer: t)
        if message == refuse:
            report = dry_run.compile_step(job)
            assert report.refusal == "Ran out of memory in hbm. Used 20.1G of 15.7G hbm."
            assert not report.fits
        else:
            with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
                dry_run.compile_step(job)


def test_memory_is_that_of_the_chip_or_what_the_device_says():
    class Device:
        device_kind = "TPU v5 lite"

    class Present:
        device_kind = "a GPU"

        def memory_stats(self):
            return {"bytes_limit": 123}

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
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_step_is_compiled_for_tpus_that_are_not_there(tmp_path):
    command = [*COMMAND, f"--gin.MODEL_DIR={tmp_path}/run", "--dry_run", "--topology=v5e:2x2"]
    tests = toy.__file__.rpartition("/")[0]
    program = f"import sys; sys.path.insert(0, {tests!r}); import toy; toy.register(); "
    program += "from diffusion_t5x import train; "
    run = subprocess.run(
        [sys.executable, "-c", program + f"train.main({command!r})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "mesh: {'data': 4, 'model': 1} of TPU v5 lite" in run.stdout
    assert "all-reduce: " in run.stdout
    assert run.stdout.splitlines()[-1] == "fits"


def test_the_documented_commands_parse():
    text = (pathlib.Path(__file__).parents[2] / "docs/pods.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m diffusion_t5x.train ((?:.*\\\n)+.*)", text)
    assert len(commands) == 2
    for command in commands:
        gin.clear_config()
        flags = [flag for flag in shlex.split(command) if flag.startswith("--gin")]
        files = [flag.partition("=")[2] for flag in flags if flag.startswith("--gin_file")]
        bindings = [flag.removeprefix("--gin.") for flag in flags if flag.startswith("--gin.")]
        gin_utils.parse_config(files, bindings)
