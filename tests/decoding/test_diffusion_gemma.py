"""The entropy bound and its stop, against the classes that DiffusionGemma has in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.decoding import canvases
from diffusion_t5x.decoding.readout import read_hidden
from diffusion_t5x.decoding.stopping import StableAndConfident
from diffusion_t5x.decoding.updates import EntropyBound
from diffusion_t5x.interfaces import StepView
from diffusion_t5x.objectives.corruption import UniformCorruption

ROWS, LENGTH, VOCAB, NOISE = 4, 9, 13, 12


class _Noise(UniformCorruption):
    def prior(self, rng, shape):
        return jnp.full(shape, NOISE, jnp.int32)


def _logits(step):
    """Logits that become certain with the steps, in some rows sooner; some are -inf."""
    rng = np.random.default_rng(step // 2)  # the same twice, so that argmaxes are stable
    scale = np.array([40.0, 6.0, 2.0, 0.5])[:, None, None] * (1 + step)
    logits = scale * rng.normal(size=(ROWS, LENGTH, VOCAB))
    logits[..., NOISE] = -np.inf
    logits[:, 2, 4:] = -np.inf
    logits[:, 3, 1:] = -np.inf
    return logits.astype(np.float32)


@pytest.mark.parametrize(
    "bound", [0.1, *(pytest.param(b, marks=pytest.mark.slow) for b in (0.01, 2.0))]
)
def test_each_position_is_accepted_and_each_canvas_done_as_in_transformers(bound):
    torch = pytest.importorskip("torch")
    name = "transformers.models.diffusion_gemma.generation_diffusion_gemma"
    theirs = pytest.importorskip(name)
    config = theirs.EntropyBoundSamplerConfig(entropy_bound=bound)
    sampler = theirs.EntropyBoundSampler(config, LENGTH, VOCAB, 6)
    stopping = theirs.StableAndConfidentStoppingCriteria(1, 0.3)
    rule, stop = EntropyBound(bound), StableAndConfident(0.3)
    corruption, key = _Noise(VOCAB), jax.random.PRNGKey(0)
    canvas = canvases.start(corruption.prior(key, (ROWS, LENGTH)), 6, keep_trajectory=False)

    @jax.jit
    def take(canvas, logits, temperature, index):
        readout = read_hidden(logits, lambda x: x, canvas.tokens, key, temperature, 2**20)
        view = StepView(canvas, readout, index, 6)
        new, score = rule(view, key, corruption)
        return new._replace(readout=readout, score=score), stop(view, score)

    seen = []
    for step, temperature in enumerate(np.linspace(0.8, 0.4, 6, dtype=np.float32)):
        logits = _logits(step)
        canvas, done = take(canvas, logits, temperature, step)
        scaled = torch.tensor(logits / temperature)
        # Tokens that cannot be noise, so that the renoised canvas tells what was accepted.
        zeros = torch.zeros((ROWS, LENGTH), dtype=torch.long)
        sampler.accept_canvas(zeros, zeros, scaled, 6 - step)
        accepted = np.asarray(canvas.tokens) != NOISE
        np.testing.assert_array_equal(accepted, sampler.accepted_token_mask.numpy())
        their_done = stopping(scaled.argmax(-1), scaled).numpy()
        np.testing.assert_array_equal(done, their_done)
        np.testing.assert_array_equal(canvas.text, logits.argmax(-1))
        seen.append((accepted.mean(), their_done.mean()))
    assert {0 < share < 1 for share, _ in seen} == {True}
    assert len({share for _, share in seen}) > 1
