"""Update rules: what a denoising step writes into a canvas, given what the network says about it.

Each is an `interfaces.UpdateRule`: a frozen dataclass whose fields gin binds, called with the step,
a key and the noise; it returns the canvases and their scores. Three kinds of score, each of which
compares samples that one rule wrote:

- the model score, of the canvas that the step read (`canvas_score`): rules that rewrite anything;
- the log-likelihood of the argmax, for a canvas that holds fresh noise: `EntropyBound`;
- the chain rule along the order of writing, each token's log-probability in the step that wrote it,
  which for one token per step is a log-likelihood: `ConfidenceUnmask`, `Ancestral`, `Remask`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Canvas, Corruption, StepView
from diffusion_t5x.names import check_known

Array = jax.Array
MEASURES = ("probability", "margin", "entropy")
SIGMAS = ("capped", "rescaled")


def canvas_score(step: StepView, corruption: Corruption) -> Array:
    """Scores canvases by the log-likelihood of their tokens under the readout: `[rows]` in nats.

    This is minus the cross-entropy between the tokens that a step read and the logits that it
    returned, the paper's model score (arXiv 2401.17181, section 4.1). A token that can only be
    noise counts as the draw in its place.
    """
    readout = step.readout
    noise = corruption.is_noise(step.canvas.tokens)
    log_prob = jnp.where(noise, readout.drawn_log_prob, readout.canvas_log_prob)
    return jnp.sum(log_prob, axis=-1)


def _take(step: StepView, where: Array, tokens: Array, log_prob: Array, noise: Array) -> Canvas:
    """Writes `tokens` at the positions `where`; a text has the argmax where noise would be left."""
    tokens = jnp.where(where, tokens, step.canvas.tokens)
    certainty = jnp.where(where, log_prob, step.canvas.certainty)
    text = jnp.where(noise & ~where, step.readout.argmax, tokens)
    return step.canvas._replace(tokens=tokens, text=text, certainty=certainty)


def _rank(values: Array) -> Array:
    """Ranks each row of `values [rows, length]`, the lowest as 0; the first of equals is lower."""
    return jnp.argsort(jnp.argsort(values, axis=-1, stable=True), axis=-1)


def _lowest(values: Array, share: float) -> Array:
    """Marks the share of lowest values, at least one, of each row of `values [rows, length]`."""
    return _rank(values) < max(1, round(share * values.shape[1]))


def _check_share(name: str, share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} = {share}; expected 0 < {name} <= 1.")


@dataclasses.dataclass(frozen=True)
class ResampleAll:
    """Draws every position at each step: the paper's sampler (arXiv 2401.17181, section 4.1)."""

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the drawn canvas."""
        del rng
        drawn, certainty = step.readout.drawn, step.readout.drawn_log_prob
        canvas = step.canvas._replace(tokens=drawn, text=drawn, certainty=certainty)
        return canvas, canvas_score(step, corruption)


@dataclasses.dataclass(frozen=True)
class ResampleShare:
    """Draws a random share of the positions at each step (SUNDAE, arXiv 2112.06749, section 2.3).

    Fewer positions at a time keep samples diverse at the price of more steps. Positions that were
    never drawn are returned as uniform noise, so `num_steps * share` should be well above 1, or as
    the argmax where they are masks.

    Attributes:
      share: share of the positions that each step draws.
    """

    share: float = 0.5

    def __post_init__(self):
        _check_share("share", self.share)

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the canvas with draws at the chosen positions."""
        where = _lowest(jax.random.uniform(rng, step.canvas.tokens.shape), self.share)
        noise = corruption.is_noise(step.canvas.tokens)
        canvas = _take(step, where, step.readout.drawn, step.readout.drawn_log_prob, noise)
        return canvas, canvas_score(step, corruption)


@dataclasses.dataclass(frozen=True)
class ArgmaxUnrolled:
    """Unrolls the argmax for what is uncertain (SUNDAE, arXiv 2112.06749, section 2.3).

    Steps come in pairs. The first of a pair writes the argmax everywhere; the second reads that,
    and rewrites only the positions whose argmax was least likely in the first. Of an odd number of
    steps the last is a first one. Temperature plays no part.

    Attributes:
      uncertain_share: share of the positions that the second step of a pair rewrites.
    """

    uncertain_share: float = 0.3

    def __post_init__(self):
        _check_share("uncertain_share", self.uncertain_share)

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the canvas with the argmax everywhere, or at uncertain positions."""
        del rng
        where = _lowest(step.canvas.certainty, self.uncertain_share) | (step.step_index % 2 == 0)
        readout, noise = step.readout, corruption.is_noise(step.canvas.tokens)
        canvas = _take(step, where, readout.argmax, readout.argmax_log_prob, noise)
        return canvas, canvas_score(step, corruption)


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """Accepts draws of low entropy, and gives all other positions fresh noise.

    Accepted are the positions of lowest entropy whose entropies, the largest of them aside, sum to
    at most `bound`, which bounds the cost of drawing them independently (arXiv 2505.24857); fresh
    noise elsewhere keeps the canvas one that the model was trained on. Entropies are those of the
    distribution that is drawn from, as in DiffusionGemma. The text, and with it the score, is the
    argmax.

    Attributes:
      bound: in nats.
    """

    bound: float = 0.1

    def __post_init__(self):
        if self.bound < 0:
            raise ValueError(f"bound = {self.bound}; expected a value >= 0, in nats.")

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the draw at accepted positions, and noise elsewhere."""
        readout = step.readout
        order = jnp.argsort(readout.entropy, axis=-1)
        ascending = jnp.take_along_axis(readout.entropy, order, axis=-1)
        before = jnp.cumsum(ascending, axis=-1) - ascending
        accepted_count = jnp.sum(before <= self.bound, axis=-1, keepdims=True)
        accepted = jnp.argsort(order, axis=-1) < accepted_count
        tokens = jnp.where(accepted, readout.drawn, corruption.prior(rng, readout.drawn.shape))
        certainty = jnp.where(accepted, readout.drawn_log_prob, -jnp.inf)
        canvas = step.canvas._replace(tokens=tokens, text=readout.argmax, certainty=certainty)
        return canvas, jnp.sum(readout.argmax_log_prob, axis=-1)


@dataclasses.dataclass(frozen=True)
class ConfidenceUnmask:
    """Draws once for each position, the most confident first, and keeps what was drawn.

    Each step writes at least the `per_step` most confident of the positions that are still noise,
    those whose confidence reaches `threshold`, and as many as leave even shares for the steps that
    follow, so that the last step writes all that is left. Without either setting this is LLaDA's
    low-confidence remasking (arXiv 2502.09992, section 2.4); with a threshold and at least as many
    steps as positions, Fast-dLLM's (arXiv 2505.22618, section 3.3). Noise may be masks, or uniform,
    which stays on the canvas until it is written over. A text is done when no noise is left.

    Attributes:
      measure: what confidence is: 'probability', that of the draw; 'margin', the probability of
        the argmax less that of the next; 'entropy', of the distribution that is drawn from, in
        nats, of which a low one is confident.
      threshold: at least this probability or margin, or at most this entropy; None for none.
      per_step: a number of positions; None for 1.
    """

    measure: str = "probability"
    threshold: float | None = None
    per_step: int | None = None
    keeps_text: ClassVar[bool] = True
    finishes: ClassVar[bool] = True

    def __post_init__(self):
        check_known(self.measure, MEASURES, "ConfidenceUnmask.measure")
        highest = float("inf") if self.measure == "entropy" else 1.0
        if self.threshold is not None and not 0.0 < self.threshold <= highest:
            raise ValueError(
                f"threshold = {self.threshold}; expected 0 < threshold <= {highest} for measure = "
                f"{self.measure!r}, or None."
            )
        if self.per_step is not None and self.per_step < 1:
            raise ValueError(f"per_step = {self.per_step}; expected at least 1, or None.")

    @property
    def needs_margin(self) -> bool:
        """Returns whether the measure is the margin."""
        return self.measure == "margin"

    def _confidence(self, step: StepView) -> Array:
        """Returns the measure, negative for entropies: `[rows, length]`."""
        if self.measure == "margin":
            assert step.readout.margin is not None  # the decoder saw `needs_margin`
            return step.readout.margin
        if self.measure == "entropy":
            return -step.readout.entropy
        return jnp.exp(step.readout.drawn_log_prob)

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the canvas with draws at the most confident positions of noise."""
        del rng, corruption
        readout, canvas = step.readout, step.canvas
        noise = canvas.certainty == -jnp.inf
        confidence = self._confidence(step)
        count = jnp.sum(noise, axis=-1, keepdims=True)
        share = -(-count // (step.num_steps - step.step_index))
        share = jnp.maximum(share, self.per_step or 1)
        where = _rank(jnp.where(noise, -confidence, jnp.inf)) < share
        if self.threshold is not None:
            least = -self.threshold if self.measure == "entropy" else self.threshold
            where |= confidence >= least
        where &= noise
        new = _take(step, where, readout.drawn, readout.drawn_log_prob, noise)
        done = jnp.all(new.certainty > -jnp.inf, axis=-1)
        score = jnp.where(noise & ~where, readout.argmax_log_prob, new.certainty)
        return new._replace(done=done), jnp.sum(score, axis=-1)


def _times(step: StepView) -> tuple[Array, Array]:
    """Returns the time of a step and that of the next, evenly spaced from 1 to 0: `[1, 1]` each."""
    times = jnp.stack([step.num_steps - step.step_index, step.num_steps - step.step_index - 1])
    now, later = times.astype(jnp.float32).reshape(2, 1, 1) / step.num_steps
    return now, later


def _text(step: StepView, noise: Array) -> tuple[Array, Array]:
    """Returns the draw where a canvas is noise and what it has elsewhere, and log-probabilities.

    Of a token that the canvas has, that is the one in the step that wrote it.
    """
    readout, canvas = step.readout, step.canvas
    text = jnp.where(noise, readout.drawn, canvas.tokens)
    return text, jnp.where(noise, readout.drawn_log_prob, canvas.certainty)


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """Goes back in time by the noise's own posterior, given a draw of the clean text.

    The time of step `i` of `n` is `1 - i / n`. At temperature 1 and for many steps, samples are
    those of the model (arXiv 2107.03006, section 3; with masks MDLM's, arXiv 2406.07524).
    """

    keeps_text: ClassVar[bool] = True

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the canvas at the time of the next step; its text is the draw of a clean one."""
        canvas, (now, later) = step.canvas, _times(step)
        # Where noise is masks alone, a token that is none is clean, and stays.
        noise = corruption.is_noise(canvas.tokens) | (corruption.masses(now).uniform > 0)
        text, log_prob = _text(step, noise)
        tokens = corruption.posterior(rng, canvas.tokens, text, now, later)
        tokens = jnp.where(step.step_index + 1 < step.num_steps, tokens, text)
        certainty = jnp.where(tokens == text, log_prob, -jnp.inf)
        canvas = canvas._replace(tokens=tokens, text=text, certainty=certainty)
        return canvas, jnp.sum(log_prob, axis=-1)


@dataclasses.dataclass(frozen=True)
class Remask:
    """Takes ancestral steps that mask some of the text again, to be written anew: ReMDM.

    Needs mask noise. A token of the text is masked again with probability `sigma`, and masks are
    written so often that the share of masks at each time is that of the noise all the same (arXiv
    2503.00307, section 3); `sigma_max = min(1, (1 - later) / now)` for the clean shares of the
    times of this step and the next. Its schedules are those of section 4.1.

    Attributes:
      sigma: 'capped' is `min(eta, sigma_max)`, 'rescaled' is `eta * sigma_max`.
      eta: in [0, 1]; 0 is `Ancestral`.
      by_confidence: multiply sigma by softmax(-p) over the text, for the probability p that each
        token had when it was written, so that what was unlikely is masked rather. There are then
        more masks than the noise would have.
    """

    sigma: str = "capped"
    eta: float = 0.02
    by_confidence: bool = False
    keeps_text: ClassVar[bool] = True

    def __post_init__(self):
        check_known(self.sigma, SIGMAS, "Remask.sigma")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta = {self.eta}; expected 0 <= eta <= 1.")

    def check(self, corruption: Corruption) -> None:
        """Checks that all noise is masks.

        Raises:
          ValueError: if not.
        """
        with jax.ensure_compile_time_eval():
            masses = corruption.masses(jnp.array([0.25, 0.5, 0.75]))
            if jnp.any(masses.uniform > 0):
                raise ValueError(
                    f"update = {self}: {type(corruption).__name__} has uniform noise; expected "
                    "mask noise alone, or another rule, such as Ancestral."
                )

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Returns the canvas at the time of the next step."""
        mask_rng, write_rng, noise_rng = jax.random.split(rng, 3)
        canvas, (now, later) = step.canvas, _times(step)
        clean, later_clean = corruption.masses(now).clean, corruption.masses(later).clean
        noise = corruption.is_noise(canvas.tokens)
        text, log_prob = _text(step, noise)
        most = jnp.minimum(1.0, (1.0 - later_clean) / jnp.maximum(clean, 1e-30))
        sigma = jnp.minimum(self.eta, most) if self.sigma == "capped" else self.eta * most
        if self.by_confidence:
            doubt = jnp.where(noise, -jnp.inf, -jnp.exp(canvas.certainty))
            # A row without text has nothing to mask.
            doubt = jnp.where(jnp.all(noise, axis=-1, keepdims=True), 0.0, doubt)
            sigma = jnp.where(noise, 0.0, sigma * jax.nn.softmax(doubt, axis=-1))
        written = (later_clean - (1.0 - sigma) * clean) / jnp.maximum(1.0 - clean, 1e-30)
        shape = text.shape
        write = noise & (jax.random.uniform(write_rng, shape) < written)
        keep = ~noise & (jax.random.uniform(mask_rng, shape) >= sigma)
        is_text = write | keep | (step.step_index + 1 == step.num_steps)
        tokens = jnp.where(is_text, text, corruption.prior(noise_rng, shape))
        certainty = jnp.where(is_text, log_prob, -jnp.inf)
        canvas = canvas._replace(tokens=tokens, text=text, certainty=certainty)
        return canvas, jnp.sum(log_prob, axis=-1)
