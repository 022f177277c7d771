"""Tests of `benchmarks.tpu` that need no TPU compiler."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

import gin
from benchmarks import tpu, tpu_programs
from benchmarks.shapes import Shape
from diffusion_t5x import gin_utils, models

TINY = Shape(vocab_size=50, embed_dim=8, num_layers=3, num_heads=2, head_dim=4, mlp_dim=16)


@pytest.mark.parametrize("part", ["training", "decoding"])
def test_without_libtpu_it_says_what_to_install(monkeypatch, part):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"libtpu.*pip install 'diffusion_t5x\[tpu\]'"):
        tpu.main([f"--parts={part}"])


def test_an_unknown_size_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit):
        tpu.main(["--sizes=base,huge"])
    assert "'huge' is unknown; expected some of base, large, xl" in capsys.readouterr().err


def test_a_growing_cache_costs_each_length_the_tokens_it_holds():
    seconds = {512: 1.0, 1024: 2.0, 4096: 8.0}
    assert tpu.ar_seconds(512, seconds) == 512  # with 128 and 256 at the cost of 512
    # A cache of 2,048 lies a third of the way from 1,024 to 4,096.
    assert tpu.ar_seconds(4096, seconds) == 512 * 1 + 512 * 2 + 1024 * 4 + 2048 * 8


def test_programs_have_the_shapes_that_they_are_named_for():
    shape = dataclasses.replace(TINY, num_layers=1)
    function, arguments = tpu_programs.token(shape, 2, 16)
    cache, tokens, scores = jax.eval_shape(function, *arguments)
    assert cache.visible.shape == (2, 16)
    assert tokens.shape == scores.shape == (2,)
    for canvas in (15, 4):  # all of the text, then its end after a cached beginning
        function, arguments = tpu_programs.denoising_step(shape, 2, 16, canvas, 2**20)
        assert jax.eval_shape(function, *arguments).argmax.shape == (2, canvas)
        cached = "KVCache" in type(arguments[1]).__name__
        assert cached == (canvas == 4)
    function, arguments = tpu_programs.gradient(shape, "diffusion", 2, 16)
    loss, gradients = jax.eval_shape(function, *arguments)
    assert loss.shape == ()
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, arguments[0])


def test_the_settings_for_tpus_are_those_of_the_benchmark():
    files = ["models/base.gin", "objectives/diffusion.gin", "runs/pretrain.gin", "hardware/tpu.gin"]
    data = ["MIXTURE_OR_TASK_NAME='x'", "MODEL_DIR='x'", "TASK_FEATURE_LENGTHS={'targets': 8}"]
    gin_utils.parse_config(files, data)
    model = gin.get_configurable(models.Model)()
    set_so = dataclasses.asdict(model.module.config)
    set_so["block_logits"] = model.objective.cross_entropy.block_logits
    assert {name: set_so[name] for name in tpu.LARGE_BLOCKS} == tpu.LARGE_BLOCKS
    set_so["block_logits"] = model.decoder.block_logits
    assert {name: set_so[name] for name in tpu.DECODING} == tpu.DECODING


def test_parameters_are_cast_and_nothing_else():
    params = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    _, (cast, same) = tpu.in_bfloat16((None, (params, tokens)))
    assert cast == {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
    assert same == tokens
