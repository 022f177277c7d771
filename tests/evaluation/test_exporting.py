"""Exports: a process without this package decodes the tokens that our decoders do."""

import contextlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy
from small_networks import QUICK

from diffusion_t5x import export
from diffusion_t5x.checkpointing.checkpoints import (
    Checkpointer,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from diffusion_t5x.decoding import stopping, updates
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.evaluation import exporting
from diffusion_t5x.models import Model
from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import INIT_SHAPES, TrainState, named_leaves

CORRUPTION = UniformCorruption(toy.VOCABULARY.vocab_size)
PREFIXES = [[5, 6, 7], [8, 9, 10, 11, 12]]
KEY = jax.random.PRNGKey(0)


def _model(objective, decoder, architecture="decoder_only", **config):
    network = toy.model(architecture=architecture, **config).module
    return Model(network, objective, decoder, toy.VOCABULARY, None)


def _diffusion(pattern="bidirectional", architecture="decoder_only", config=(), **decoder):
    decoder = DiffusionDecoder(CORRUPTION, **{"num_steps": 3, "num_samples": 2, **decoder})
    objective = StepUnrolledDenoising(CORRUPTION, attention_pattern=pattern)
    return _model(objective, decoder, architecture, **dict(config))


ROTARY = {"positions": "rotary", "num_kv_heads": 2, "scan_layers": True, "num_layers": 2}
MODELS = {
    "whole canvas": _diffusion,
    "cached prefix": lambda: _diffusion("cached_prefix", prefix_cache=True, config=ROTARY),
    "autoregressive": lambda: _model(NextToken(), AutoregressiveDecoder(), num_layers=2),
}
OTHERS = {
    "encoder-decoder": lambda: _diffusion(architecture="encoder_decoder"),
    "encoder-decoder, cached": lambda: _diffusion(
        "cached_prefix", "encoder_decoder", prefix_cache=True
    ),
    "encoder-decoder, autoregressive": lambda: _model(
        NextToken(), AutoregressiveDecoder(2, temperature=1.0), "encoder_decoder"
    ),
    "a rule with memory, noise and a stop": lambda: _diffusion(
        update=updates.EntropyBound(), stop=stopping.StableAndConfident(9.0), trim_multiple=2,
        num_steps=5,
    ),
}  # fmt: skip


def _params(model):
    shapes = jax.eval_shape(lambda: model.get_initial_variables(KEY, INIT_SHAPES)["params"])
    rng = np.random.default_rng(0)

    def draw(path, x):
        return rng.normal(path[-1].key == "scale", 0.5, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _batch(size=2):
    prefixes = np.zeros((size, 6), np.int32)
    for row, tokens in enumerate(PREFIXES):
        prefixes[row, : len(tokens)] = tokens
    return {
        "encoder_input_tokens": prefixes,
        "decoder_input_tokens": np.zeros((size, 6), np.int32),
    }


def _decoded(model, params, key=KEY):
    decode = jax.jit(lambda p: model.predict_batch_with_aux(p, _batch(), key,
                                                            return_all_decodes=True))  # fmt: skip
    tokens, aux = decode(params)
    return np.asarray(tokens), np.asarray(aux["scores"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[pytest.mark.slow] if x != "encoder-decoder, cached" else [])
        for x in OTHERS
    ],
)
def test_steps_taken_one_by_one_decode_what_the_decoder_does(name):
    model = OTHERS[name]()
    params = _params(model)
    traced = exporting.trace(model, params, 2, toy.LENGTHS)
    prefill, step = (
        jax.jit(traced.functions[name], compiler_options=QUICK) for name in exporting.FUNCTIONS
    )
    flat, key = named_leaves(params), jax.random.PRNGKey(3)
    state, tokens, scores = prefill(flat, _batch()["encoder_input_tokens"], key)
    for _ in range(traced.num_steps):
        changed, tokens, scores = step(flat, state, key)
        assert not any(name.startswith("0/") for name in changed)  # prefixes stay where they are
        state = {**state, **changed}
    expected = _decoded(model, params, key)
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Directory and model of each export, whose checkpoints are written by hand."""
    made = {}
    for name, make in MODELS.items():
        model, root = make(), tmp_path_factory.mktemp("export")
        params = _params(model)
        with contextlib.closing(Checkpointer(str(root / "run"), SaveCheckpointConfig())) as saver:
            saver.save(TrainState(jax.numpy.int32(7), params, None))
        platforms = ("cpu", "tpu", "cuda") if name == "cached prefix" else ("cpu",)
        _export(model, root / "run", root / "out", platforms=platforms)
        made[name] = root / "out", model, params
    return made


def _export(model, run, out, **settings):
    exporting.export(
        **{
            "model": model,
            "restore_checkpoint_cfg": RestoreCheckpointConfig(str(run)),
            "partitioner": PjitPartitioner(),
            "task_feature_lengths": toy.LENGTHS,
            "batch_size": 2,
            "export_dir": str(out),
            "platforms": ("cpu",),
            **settings,
        }
    )


def test_a_process_without_this_package_decodes_the_same_tokens(exports, tmp_path):
    # One process runs the program of each export, since importing jax takes seconds.
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import io, json, runpy, sys\n"
        "sys.modules['diffusion_t5x'] = sys.modules['flax'] = None\n"
        "for folder in sys.argv[1:]:\n"
        f"    sys.stdin = io.StringIO({json.dumps(PREFIXES)!r})\n"
        "    runpy.run_path(folder + '/run.py', run_name='__main__')\n"
        "    print()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, runner, *(str(out) for out, *_ in exports.values())],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line, (_, model, params) in zip(lines, exports.values(), strict=True):
        expected = _decoded(model, params)[0][:, -1]
        assert len({*expected.ravel()}) > 2  # else equality would say little
        np.testing.assert_array_equal(line, expected)


def test_the_manifest_says_what_the_functions_take_and_return(exports):
    out, _, params = exports["cached prefix"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", "model.safetensors", "prefill.jax_export", "step.jax_export", "run.py",
    }  # fmt: skip
    assert (manifest["steps"], manifest["batch_size"], manifest["eos_id"]) == (3, 2, 1)
    assert manifest["lengths"] == toy.LENGTHS
    for name, described in manifest["functions"].items():
        content = (out / described["file"]).read_bytes()
        exported = jax.export.deserialize(bytearray(content))
        assert exported.platforms == ("cpu", "tpu", "cuda")
        for ours, theirs in (("inputs", exported.in_avals), ("outputs", exported.out_avals)):
            assert [(tuple(x["shape"]), x["dtype"]) for x in described[ours]] == [
                (x.shape, x.dtype.name) for x in theirs
            ], name
    state = [x["name"] for x in manifest["functions"]["step"]["inputs"]]
    assert any("key_values" in name for name in state)
    assert set(named_leaves(params)) <= {name.removeprefix("0/") for name in state}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"platforms": ("cpu", "gpu")}, "PLATFORMS.*gpu.*cuda"),
        ({"platforms": ()}, "expected some of"),
        ({"batch_size": 0}, "BATCH_SIZE = 0"),
        ({"model": lambda: _diffusion(halve_every=1)}, "halve_every = 1, which drops"),
        ({"model": lambda: _diffusion(config={"attention_kernel": "fused"})}, "expected 'xla'"),
        ({"model": lambda: _diffusion(config={"mlp_dim": 8})}, "does not fit this model"),
        ({"export_dir": "out"}, "not empty"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(exports, settings, message):
    out, model, _ = exports["whole canvas"]
    if "export_dir" in settings:
        settings = {"export_dir": str(out)}
    if "model" in settings:
        model, settings = settings["model"](), {}
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        _export(model, out.parent / "run", out.parent / "other", **settings)
    assert sorted(out.parent.iterdir()) == before


def test_the_command_binds_what_gin_says_and_a_dry_run_writes_nothing(exports, capsys):
    out, _, _ = exports["whole canvas"]
    shape = {"embed_dim": 16, "mlp_dim": 16, "num_heads": 4, "head_dim": 4, "num_layers": 1}
    export.main(
        [
            "--gin_file=models/tiny.gin",
            "--gin_file=objectives/diffusion.gin",
            "--gin.vocabularies.get_vocabulary.name=bytes",
            "--gin.vocabularies.get_vocabulary.extra_ids=0",
            f"--gin.VOCAB_SIZE={toy.VOCAB_SIZE}",
            *(f"--gin.config.TransformerConfig.{name}={x}" for name, x in shape.items()),
            f"--gin.CHECKPOINT_PATH={out.parent / 'run'}",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 3, 'targets': 2}",
            "--platforms=tpu",
            f"--to={out.parent / 'other'}",
            "--dry_run",
        ]
    )
    assert "step.jax_export" in capsys.readouterr().out
    assert not (out.parent / "other").exists()
