"""What devices tell each other in compiled training steps, against what theory says suffices."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import collectives
from benchmarks.collectives import RULES, Step
from benchmarks.shapes import Shape

# Logits of 16 positions of a text at once: the loss reads each in two blocks.
SMALL = {
    "shape": Shape(
        vocab_size=1024, embed_dim=24, num_layers=1, num_heads=4, head_dim=4, mlp_dim=40
    ),
    "prefix": 20,
    "target": 32,
    "settings": {"block_logits": 16 * 1024},
}
STEPS = {
    "data": Step("diffusion", RULES["data"], **SMALL),
    "sharded": Step("diffusion", RULES["data, 2-D parameters"], **SMALL),
    "tensor": Step("autoregressive", RULES["tensor"], **SMALL),
}
EMBEDDING = 1024 * 24
LAYERS = 4 * 24 * 16 + 3 * 24 * 40
PROGRAM = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
from benchmarks.collectives import measure
from tests.benchmarks.test_collectives import STEPS
print(json.dumps({
    name: measure(step.compile(jax.devices()), step, 8) for name, step in STEPS.items()
}))
"""


@pytest.fixture(scope="module")
def found():
    """Bytes by kind of arrays and of collective, as eight simulated devices compile each step."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_theory_is_what_was_counted_by_hand():
    assert STEPS["data"].expected(8) == {
        "gradients": 4 * (2 * LAYERS + EMBEDDING),
        "weights": 0,
        "activations": 0,
    }
    assert STEPS["sharded"].expected(8) == {
        "gradients": 4 * (2 * LAYERS + EMBEDDING) / 8,
        "weights": 4 * (2 * 2 * LAYERS + EMBEDDING),
        "activations": 0,
    }
    hidden = 44 * 52 * 24
    assert STEPS["tensor"].expected(8) == {
        "gradients": 4 * (LAYERS + EMBEDDING) / 4,
        "weights": 0,
        "activations": 4 * ((5 + 1) * hidden + 44 * 32 * 24),
    }


@pytest.mark.parametrize("rules", RULES.values())
@pytest.mark.parametrize("settings", [{}, SMALL])
def test_activations_are_of_no_size_of_a_weight(rules, settings):
    step = Step("diffusion", rules, **settings)
    rows = step.batch_size // (8 // rules.partitions)
    for positions in range(1, step.prefix + step.target + 1):
        assert not collectives.is_weight(rows * positions * step.shape.embed_dim, step, 8)


def test_data_parallel_passes_sum_gradients_and_nothing_else(found):
    # The embedding's gradient is summed once for all logits, and once for the lookup of each pass.
    assert found["data"]["gradients"] == {"all-reduce": 4 * (2 * LAYERS + 3 * EMBEDDING)}
    assert "weights" not in found["data"]
    # Norms, the bias of each distance and scalars; no bias of all pairs of positions.
    assert sum(found["data"]["activations"].values()) < 4 * 52 * 52


def test_split_weights_are_gathered_where_they_are_used_and_logits_never(found):
    assert found["sharded"]["weights"] == {"all-gather": 4 * (2 * 2 * LAYERS + EMBEDDING)}
    assert found["sharded"]["gradients"] == {"all-reduce": 4 * (2 * LAYERS + EMBEDDING)}
    assert max(found["sharded"]["activations"].values()) < 4 * 11 * 16 * 1024  # a block's logits


def test_between_copies_of_a_model_hidden_states_are_summed_and_no_vocabulary_gathered(found):
    assert "weights" not in found["tensor"]
    # The embedding's gradient twice: of logits and of the lookup.
    assert found["tensor"]["gradients"] == {"all-reduce": LAYERS + 2 * EMBEDDING}
    # XLA sums the gradients of query, key and value, and of both inputs of feed-forward, after they
    # have been sent and not before: 8 arrays for 5.
    expected = STEPS["tensor"].expected(8)["activations"]
    size = sum(found["tensor"]["activations"].values())
    assert expected < size < 8 / 5 * expected * 1.02
