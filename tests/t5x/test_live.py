"""T5X itself at work with our models, gin files and checkpoints: `make test-t5x`."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import parity
import pytest

import gin
from diffusion_t5x import gin_utils, models
from diffusion_t5x.checkpointing import conversion
from diffusion_t5x.checkpointing.reading import restore_params
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import INIT_SHAPES, abstract_params
from diffusion_t5x.training.metric_logs import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "t5x.md").read_text(encoding="utf-8")
TASK = "embedded_translation_en_fr"


def _have_t5x():
    try:
        return importlib.util.find_spec("t5x.train_state") is not None
    except ModuleNotFoundError:
        return False


pytestmark = [
    pytest.mark.t5x,
    pytest.mark.skipif(not _have_t5x(), reason="T5X is not on the Python path; see docs/t5x.md"),
]


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def _run(directory, command):
    """Runs a command as a reader of the page would; what it printed."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    done = subprocess.run(
        command, cwd=directory, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory in which all commands of docs/t5x.md were run, in their order."""
    directory = tmp_path_factory.mktemp("page")
    [t5_1_1] = _blocks("gin")
    (directory / "t5_1_1.gin").write_text(t5_1_1)
    [export] = [block for block in _blocks("sh") if block.startswith("export")]
    printed = [
        _run(directory, ["bash", "-euc", export + block])
        for block in _blocks("sh")
        if block != export
    ]
    assert any("T5X's optimiser state is dropped" in text for text in printed)
    return directory / "runs" / "t5x"


def _losses(directory):
    """step -> loss of the evaluations that T5X's trainer made."""
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "training_eval" / TASK), {"tensors": 0}).Reload()
    return {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")}


def test_t5xs_trainer_lowers_the_loss_of_an_ar_model(runs):
    values = _losses(runs / "ar")
    assert list(values) == [10, 20]
    assert values[20] < values[10] < np.log(768)


def test_t5xs_trainer_goes_on_with_an_ar_model_as_a_diffusion_model(runs):
    values = _losses(runs / "ar2diff")
    assert list(values) == [30, 40]
    assert values[40] < values[30] < 2 * np.log(768)


def test_t5xs_trainer_fine_tunes_and_decodes(runs):
    assert (runs / "finetuned" / "checkpoint_42").is_dir()
    [file] = (runs / "finetuned").rglob(f"{TASK}-metrics.jsonl")
    assert "bleu" in json.loads(file.read_text().splitlines()[-1])


def test_t5xs_evaluation_decodes_and_measures(runs):
    [file] = (runs / "eval").rglob(f"{TASK}-metrics.jsonl")
    [metrics] = [json.loads(line) for line in file.read_text().splitlines()]
    assert metrics["step"] == 40
    assert {"exact_match", "bleu"} <= metrics.keys()


def test_t5xs_inference_writes_predictions(runs):
    [file] = (runs / "infer").glob("*-predict.jsonl-00000-of-00100")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records
    assert all({"inputs", "prediction"} <= record.keys() for record in records)


def test_t5xs_own_t5_goes_on_as_a_diffusion_model_here(runs):
    lines = read_metrics(str(runs / "ar2diff_here"))
    assert lines[-1]["step"] == 14  # 4 steps of T5X's, 10 of ours
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_t5xs_interactive_model_decodes_with_our_model(runs):
    [example] = _blocks("python")
    check = "print([example['inputs_pretokenized'] for example, _ in predictions], aux['scores'])"
    printed = _run(runs.parent.parent, [sys.executable, "-c", f"{example}\n{check}"])
    assert re.search(r"\[b'in 5 minutes', b'948 miles'\] \[-\d+\.\d+, -\d+\.\d+\]", printed)


def test_t5x_and_we_restore_the_same_parameters_of_our_model(runs, tmp_path):
    from t5x import partitioning, utils

    gin_utils.parse_config(["models/tiny.gin", "objectives/diffusion.gin"], ["DROPOUT_RATE=0.0"])
    model = gin.get_configurable(models.Model)()
    path = str(runs / "ar2diff" / "checkpoint_40")
    ours = restore_params(path, abstract_params(model, PjitPartitioner(), INIT_SHAPES, {}))
    here = conversion.convert(path, f"{tmp_path}/here")
    back = conversion.convert(here.path, f"{tmp_path}/back", "t5x", model=model)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    initializer = utils.TrainStateInitializer(
        optimizer_def=None, init_fn=model.get_initial_variables,
        input_shapes={name: (2, 24) for name in INIT_SHAPES}, partitioner=partitioner,
    )  # fmt: skip
    tokens = np.arange(2, 20).reshape(2, 9)
    batch = {"encoder_input_tokens": tokens, "decoder_target_tokens": tokens[:, ::-1]}
    logits = jax.jit(functools.partial(_logits, model))
    for source in (path, back.path):
        restored, _ = utils.create_checkpoint_manager_and_restore(
            initializer, partitioner, utils.RestoreCheckpointConfig(path=source, mode="specific"),
            source, jax.random.PRNGKey(0), use_orbax=True,
        )  # fmt: skip
        theirs = logits(jax.device_get(restored.params), batch)
        np.testing.assert_array_equal(theirs, logits(ours, batch))


def _logits(model, params, batch):
    network = model.bind(params, batch)
    return network.logits(network.forward(batch["decoder_target_tokens"], None))


@pytest.mark.parametrize("layout", ["legacy", "orbax"])
@pytest.mark.parametrize("network", parity.NETWORKS)
def test_checkpoints_pass_both_ways_with_the_same_numbers(network, layout, tmp_path):
    import t5x_side

    params = t5x_side.initial_params(network, seed=5)
    path = t5x_side.write_checkpoint(network, params, f"{tmp_path}/theirs", layout)
    model = parity.our_model(network)
    abstract = abstract_params(model, PjitPartitioner(), t5x_side.INPUT_SHAPES, {})
    ours = restore_params(path, abstract)
    if layout == "legacy":
        theirs = t5x_side.t5x_numbers(network, params)
        parity.assert_equal(parity.our_numbers(network, ours), theirs)
    there = conversion.convert(path, f"{tmp_path}/ours")
    back = conversion.convert(there.path, f"{tmp_path}/back", f"t5x:{network}")
    for manager in ("legacy", "orbax"):
        # The same parameters, bit by bit, so the same logits.
        restored, step = t5x_side.read_checkpoint(network, back.path, manager)
        assert step == parity.STEP
        jax.tree.map(np.testing.assert_array_equal, restored, params)
