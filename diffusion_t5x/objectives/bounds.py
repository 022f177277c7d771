"""Denoising whose loss is a bound of the likelihood: mask, uniform and mixed noise by one formula.

With `a` the probability that a token is clean at time `t`, `b(v)` that noise has put token `v` in
its place, `x` the clean token and `x_theta` the network's distribution, a token of the canvas has
the distribution `q = a x + b`, and the network's guess of it is `p = a x_theta + b`. The
continuous-time bound of the negative log-likelihood is the integral over time of

    w (KL(q || p) + q(z) / p(z) - log(q(z) / p(z)) - 1),   w = (b'(z) - b(z) a' / a) / q(z)

summed over positions, `z` being what the canvas has there (GIDD, arXiv 2503.04482, theorem 3.1).
For mask noise it is `-a' / (1 - a)` times the cross-entropy of masked tokens (MDLM, arXiv
2406.07524, equation 10; MD4, arXiv 2406.04329, equation 4), for uniform noise that of UDLM (arXiv
2412.10193, equation 18) and Duo (arXiv 2506.10892).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import Masses, Metrics, Network, Score
from diffusion_t5x.names import check_known
from diffusion_t5x.objectives.canvas_objective import CanvasObjective
from diffusion_t5x.objectives.corruption import ScheduledCorruption
from diffusion_t5x.objectives.infilling import keep_fixed
from diffusion_t5x.objectives.losses import TokenLoss, TokenReadout, by_rate
from diffusion_t5x.objectives.self_conditioning import forward_conditioned, self_condition

Array = jax.Array
# Rates of change are taken between these times: at the very ends some are infinite.
EARLIEST, LATEST = 1e-6, 1.0 - 1e-6
LEAST = 1e-15  # mass of anything, so that quotients, logarithms and their gradients exist


@dataclasses.dataclass(frozen=True)
class BoundDenoising(CanvasObjective[ScheduledCorruption]):
    """Denoises a corrupted target in one pass; the loss is a bound of the likelihood, see above.

    A network with self-conditioning gets, for a random half of the texts, what a pass without
    gradient predicts.

    Attributes, besides those of `CanvasObjective`, whose `cross_entropy` has no smoothing here:
      corruption: the noise, with one time for each example. If its rates are not all of [0, 1], the
        loss is the part of the bound that belongs to them; scores are the whole bound.
      weighting: 'bound', or 'flat' for the cross-entropy of the tokens that noise replaced, each of
        which weighs 1; that is no bound, and times may be per token.
      max_weight: what the weight of a token is at most, counted as that of a cross-entropy: `a w`,
        which is `1 / t` for mask noise with linear rates. None for no limit; with one the loss is
        no bound.
    """

    _: dataclasses.KW_ONLY
    weighting: str = "bound"
    max_weight: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_known(self.weighting, ("bound", "flat"), "BoundDenoising.weighting")
        if self.weighting == "bound" and self.corruption.per_token:
            raise ValueError(
                "corruption.per_token = True: the bound needs one time for each example. Set it to "
                "False, or weighting = 'flat'."
            )
        if self.cross_entropy.label_smoothing:
            raise ValueError(
                f"label_smoothing = {self.cross_entropy.label_smoothing}: a bound of the "
                "likelihood has none; set LABEL_SMOOTHING = 0."
            )
        if self.max_weight is not None and not self.max_weight > 0:
            raise ValueError(f"max_weight = {self.max_weight}; expected a positive number or None.")
        if self.max_weight is not None and self.weighting == "flat":
            raise ValueError(f"max_weight = {self.max_weight}; weighting = 'flat' weighs all 1.")

    def loss(
        self,
        network: Network,
        targets: Array,
        weights: Array,
        rng: Array,
        fixed: Array | None = None,
    ) -> tuple[Array, Array, Metrics]:
        """Computes the loss, and metrics of the tokens that noise replaced.

        'bound' is the loss without z-loss: in nats per token what the likelihood is at least.
        """
        beside, sums, rng = self._loss_beside(network, targets, weights, rng)
        network, rng = self._drop_prefixes(network, rng)
        fixed, weights, rng = self._fix(targets, weights, rng, fixed)
        times_rng, corrupt_rng, dropout_rng, conditioning_rng, prefix_rng = jax.random.split(rng, 5)
        times = self.corruption.sample_times(times_rng, *targets.shape)
        canvas, noisy = self.corruption.corrupt(corrupt_rng, targets, times)
        canvas = keep_fixed(canvas, targets, fixed)
        conditioning: tuple[Array | None, ...] = ()
        if network.self_conditioning:
            if network.caches_prefix:
                network = network.cache_prefix(prefix_rng)  # both passes share one reading of it
            conditioning = (self_condition(network, canvas, conditioning_rng),)
        hidden = network.forward(canvas, dropout_rng, *conditioning)
        readout = self._read(network, hidden, targets, weights, canvas, times, noisy)
        noise_weights = weights * noisy
        total = jnp.sum(noise_weights)
        cross_entropy = -readout.log_prob
        rates = self.corruption.rate(times)
        metrics: dict[str, tuple[Array, Array]] = {
            "bound": (jnp.sum((readout.loss - readout.z_loss) * weights), jnp.sum(weights)),
            "z_loss": (jnp.sum(readout.z_loss * weights), jnp.sum(weights)),
            "cross_entropy": (jnp.sum(cross_entropy * noise_weights), total),
            "accuracy": (jnp.sum(readout.correct * noise_weights), total),
            "cross_entropy/by_rate": by_rate(cross_entropy, noise_weights, rates),
            **sums,
        }
        if self.weighting == "flat":
            del metrics["bound"]
        return readout.loss_sum + beside, jnp.sum(weights), metrics

    def score(self, network: Network, targets: Array, weights: Array, rng: Array) -> Score:
        """Bounds the log-likelihood of the tokens of positive weight, from all rates.

        Times are the squares of evenly spread ones, since the integrand varies most where there is
        little noise. The error is that of systematic samples, from differences of neighbours.
        """
        whole = dataclasses.replace(
            self,
            corruption=self.corruption.full_range(),
            weighting="bound",
            max_weight=None,
            cross_entropy=dataclasses.replace(self.cross_entropy, z_loss=0.0),
        )
        counted = weights > 0
        shift_rng, draws_rng = jax.random.split(rng)
        shift = jax.random.uniform(shift_rng, (targets.shape[0], 1))

        def draw(index: Array) -> Array:
            root = (shift + index) / self.score_draws
            times = root**2
            noise_rng = jax.random.fold_in(draws_rng, index)
            canvas, noisy = whole.corruption.corrupt(noise_rng, targets, times)
            canvas, noisy = jnp.where(counted, canvas, targets), noisy & counted
            hidden = forward_conditioned(network, canvas)
            readout = whole._read(network, hidden, targets, counted, canvas, times, noisy)
            return -jnp.sum(readout.loss * counted * (2 * root), axis=-1)

        bounds = jax.lax.map(draw, jnp.arange(self.score_draws))  # [score_draws, batch]
        variance = jnp.mean(jnp.square(jnp.diff(bounds, axis=0)), axis=0) / 2
        return Score(jnp.mean(bounds, axis=0), jnp.sqrt(variance / self.score_draws))

    def _read(
        self,
        network: Network,
        hidden: Array,
        targets: Array,
        weights: Array,
        canvas: Array,
        times: Array,
        noisy: Array,
    ) -> TokenReadout:
        """Reads the loss of each position off `hidden [batch, length, embed]`."""
        noise = self.corruption
        loss: TokenLoss = _weighted_cross_entropy
        conditions: tuple[Array, ...] = (noisy.astype(jnp.float32),)
        if self.weighting == "bound":
            times = jnp.broadcast_to(jnp.clip(times, EARLIEST, LATEST), targets.shape)
            masses, slopes = jax.jvp(noise.masses, (times,), (jnp.ones_like(times),))
            masses = jax.tree.map(lambda mass: jnp.maximum(mass, LEAST), masses)
            weight = self._bound_weight(masses, slopes, targets, canvas)
            if self.max_weight is not None:
                weight = jnp.minimum(weight, self.max_weight)
            conditions = (weight,)
            if not noise.only_masks:
                loss = functools.partial(_divergence, noise)
                conditions = (weight, canvas, masses.clean, masses.uniform / noise.num_uniform)
        return self.cross_entropy(
            hidden,
            network.logits,
            targets,
            weights.astype(jnp.float32),
            token_loss=loss,
            conditions=conditions,
        )

    def _bound_weight(self, masses: Masses, slopes: Masses, targets: Array, canvas: Array) -> Array:
        """Computes `a w`, by which a cross-entropy is weighed: `[batch, length]`."""
        noise = self.corruption
        is_mask = noise.is_noise(canvas)
        if noise.only_masks:
            return jnp.where(is_mask, -slopes.clean / masses.mask, 0.0)
        mass = jnp.where(is_mask, masses.mask, masses.uniform / noise.num_uniform)
        slope = jnp.where(is_mask, slopes.mask, slopes.uniform / noise.num_uniform)
        total = mass + jnp.where(canvas == targets, masses.clean, 0.0)
        return (slope * masses.clean - slopes.clean * mass) / total


def _weighted_cross_entropy(logits: Array, targets: Array, weight: Array) -> Array:
    """Computes `weight` times the cross-entropy, `[batch, length]`."""
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return weight * (jax.nn.logsumexp(logits, axis=-1) - target_logit)


def _divergence(
    noise: ScheduledCorruption,
    logits: Array,
    targets: Array,
    weight: Array,
    canvas: Array,
    clean: Array,
    each: Array,
) -> Array:
    """Computes the integrand of the bound, `[batch, length]`, where there is uniform noise.

    Both of its divergences are sums of `y - log(1 + y)`, which stays exact where `q` and `p` are
    nearly equal: `KL(q || p) = sum q(v) f(p(v) / q(v) - 1)` and, for the canvas's token,
    `f(q / p - 1)`.

    Args:
      weight: `a w`.
      clean: `a`.
      each: the mass of uniform noise at each of its tokens.
    """
    vocab_size = logits.shape[-1]
    clean, each = jnp.maximum(clean, LEAST), jnp.maximum(each, LEAST)  # chunks are padded with 0
    log_probs = jax.nn.log_softmax(logits, axis=-1)

    def at(tokens: Array) -> Array:
        return jnp.take_along_axis(
            log_probs, jnp.minimum(tokens, vocab_size - 1)[..., None], axis=-1
        )[..., 0]

    log_clean, log_each = jnp.log(clean), jnp.log(each)
    ids = jnp.arange(vocab_size)
    others = (ids < noise.vocab_size) & ~noise.is_noise(ids) & (ids != targets[..., None])
    # Tokens that are neither the target's nor the mask: q is `each`, p more by `a x_theta`.
    more = jnp.exp((log_clean - log_each)[..., None] + log_probs)
    divergence = each * jnp.sum(jnp.where(others, _excess(more, jnp.log1p(more)), 0.0), axis=-1)
    # The target's own token: q is `a` and `each`, p less.
    log_target = at(targets)
    q = clean + each
    less = clean * jnp.expm1(log_target) / q
    divergence += q * _excess(less, jnp.logaddexp(log_clean + log_target, log_each) - jnp.log(q))
    # The canvas's token; q and p of a mask are the same.
    log_drawn = at(canvas)
    is_target = canvas == targets
    q, p = each + jnp.where(is_target, clean, 0.0), each + clean * jnp.exp(log_drawn)
    moved = clean * jnp.where(is_target, -jnp.expm1(log_drawn), -jnp.exp(log_drawn)) / p
    ratio = _excess(moved, jnp.log(q) - jnp.logaddexp(log_clean + log_drawn, log_each))
    divergence += jnp.where(noise.is_noise(canvas), 0.0, ratio)
    return weight / clean * divergence


def _excess(y: Array, log: Array) -> Array:
    """Computes `y - log(1 + y)`, given `log` for that logarithm; by its series where it is tiny."""
    small = jnp.clip(y, -0.02, 0.02)
    series = small**2 * (1 / 2 - small * (1 / 3 - small * (1 / 4 - small / 5)))
    return jnp.where(jnp.abs(y) < 0.02, series, y - log)
