"""Denoise random canvases in parallel, keep the one the model scores best.

The defaults are the paper's sampler. Every other setting makes it cheaper or is another way to
sample; `docs/performance.md` says what each costs and gains.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding import denoising
from diffusion_t5x.decoding.active_set import ActiveSet, Kept, empty_kept, read_unsettled
from diffusion_t5x.decoding.block_decoding import decode_blocks
from diffusion_t5x.decoding.denoising import Rows, State
from diffusion_t5x.decoding.rerank import Decoded, best_last
from diffusion_t5x.decoding.stopping import Step
from diffusion_t5x.decoding.updates import Canvas, ResampleAll
from diffusion_t5x.interfaces import BoundNetwork
from diffusion_t5x.objectives.corruption import UniformCorruption

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DiffusionDecoder:
    """Denoises `num_samples` random canvases per prefix for `num_steps` steps.

    The defaults sample every position anew at each step (arXiv 2401.17181, section 3).

    Attributes:
      corruption: draws the first canvas.
      num_steps: denoising steps at most, each one pass over the whole canvas.
      num_samples: canvases per example, denoised side by side.
      temperature: of the draw at each step; 0 is the argmax.
      final_temperature: of the last step's draw, reached linearly; None keeps `temperature`.
      update: what a step writes into a canvas, a rule of `decoding.updates`.
      stop: when a canvas is done before its steps are over, a rule of `decoding.stopping`; None
        for never. Decoding ends when all canvases of the batch are done.
      halve_every: steps after which the half of the canvases that the network is least certain of
        is dropped, again and again until one is left; 0 keeps all to the end.
      trim_multiple: padding that ends all canvases of the batch, and that the network would write
        again, leaves the computation; what stays are as many positions as the next of
        `growth.bucket_lengths` of this number. 0 never trims.
      prefix_cache: compute the prefix's keys and values once, for all samples and steps. The same
        numbers; the objective's attention pattern must be one under which the prefix does not see
        the canvas.
      active_set: which positions are read again between passes over whole canvases, an
        `decoding.active_set.ActiveSet`; None reads all of them at each step. Needs `prefix_cache`.
      block_length: tokens of a canvas, where a text is written as a sequence of them, each joining
        the cached prefix of the next (see `decoding.blocks`); 0 for one canvas. Needs
        `prefix_cache`, and a model trained with blocks of this length.
      eos_id: the token that ends a text, after which no block is written; a negative one ends none.
        Read only with blocks.
      block_logits: logits per canvas that may be alive at once (see `losses.read_in_blocks`).
    """

    corruption: UniformCorruption
    num_steps: int = 10
    num_samples: int = 8
    temperature: float = 0.2
    final_temperature: float | None = None
    update: Any = ResampleAll()
    stop: Any = None
    halve_every: int = 0
    trim_multiple: int = 0
    prefix_cache: bool = False
    active_set: ActiveSet | None = None
    block_length: int = 0
    eos_id: int = -1
    block_logits: int = 2**22

    def __post_init__(self):
        for name in ("num_steps", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        for name in ("temperature", "halve_every", "trim_multiple", "block_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a value >= 0.")
        if (
            self.final_temperature is not None
            and min(self.temperature, self.final_temperature) <= 0
        ):
            raise ValueError(
                f"final_temperature = {self.final_temperature} with temperature = "
                f"{self.temperature}; both must be > 0, or leave final_temperature = None."
            )
        for name, file in (("active_set", "cached_prefix"), ("block_length", "blocks")):
            if getattr(self, name) and not self.prefix_cache:
                raise ValueError(
                    f"{name} needs cached prefixes; set prefix_cache = True, under an objective "
                    f"whose prefixes may be cached (objectives/diffusion_{file}.gin)."
                )
        for name, module in (("update", "updates"), ("stop", "stopping")):
            rule = getattr(self, name)
            if not callable(rule) and (name, rule) != ("stop", None):
                raise ValueError(
                    f"{name} = {rule!r}; expected a rule of diffusion_t5x.decoding.{module}."
                )

    def decode(
        self, network: BoundNetwork, length: int, rng: Array, return_trajectory: bool = False
    ) -> Decoded:
        """Decodes one text per prefix.

        A sample's score is minus the cross-entropy, summed over the canvas, between the tokens
        that the last step read and the logits that it returned; where a step renoises what it
        does not accept, between the argmax and those logits.

        With blocks there is one sample of each text, of the best ones of its blocks, whose scores
        add up.

        Args:
          network: the network, bound to `batch` prefixes.
          length: of the text, in tokens.
          rng: for the canvas and every draw.
          return_trajectory: keep the canvas of every step.

        Raises:
          ValueError: if prefixes are to be cached under a pattern that does not allow it.
        """
        if self.prefix_cache:
            network = network.with_cached_prefix()
        if self.block_length:
            decoded = decode_blocks(
                network,
                length,
                rng,
                functools.partial(
                    self._decode_canvas,
                    length=self.block_length,
                    return_trajectory=return_trajectory,
                ),
                block_length=self.block_length,
                eos_id=self.eos_id,
            )
        else:
            decoded = self._decode_canvas(network, rng, length, return_trajectory)
        cost = network.read_once + decoded.position_forwards
        return decoded._replace(position_forwards=cost)

    def _decode_canvas(
        self, network: BoundNetwork, rng: Array, length: int, return_trajectory: bool
    ) -> Decoded:
        """As `decode`, in one canvas, not counting prefix positions that are read once."""
        canvas_rng, draws_rng, updates_rng = jax.random.split(rng, 3)
        rngs = (
            jax.random.split(draws_rng, self.num_steps),
            jax.random.split(updates_rng, self.num_steps),
        )
        shape = (network.batch_size * self.num_samples, length)
        noise = self.corruption.sample_canvas(canvas_rng, shape)
        rows = denoising.start(noise, self.num_steps, return_trajectory)
        state = State(jnp.int32(0), rows, jnp.int32(0))
        finished = []
        for samples, last_step in self._stages():
            state = self._denoise(network, samples, last_step, rngs, state)
            rows = denoising.fill_trajectory(state.rows, state.step)
            rows = jax.tree.map(lambda x: x.reshape(network.batch_size, -1, *x.shape[1:]), rows)
            if last_step < self.num_steps:
                dropped, rows = _drop(rows, samples // 2)
                finished.append(dropped)
                state = state._replace(
                    rows=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
                )
        finished.append(rows)
        rows = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *finished)
        scores, tokens, trajectory = best_last(rows.score, rows.canvas.text, rows.trajectory)
        cost = jnp.full(network.batch_size, state.position_forwards)
        return Decoded(tokens, scores, trajectory, cost)

    def _stages(self) -> list[tuple[int, int]]:
        """Canvases per example, and the step up to which there are so many."""
        stages, samples, step = [], self.num_samples, self.halve_every
        while 0 < step < self.num_steps and samples > 1:
            stages.append((samples, step))
            samples -= samples // 2
            step += self.halve_every
        return [*stages, (samples, self.num_steps)]

    def _denoise(
        self,
        network: BoundNetwork,
        samples: int,
        last_step: int,
        rngs: tuple[Array, Array],
        state: State,
    ) -> State:
        """Takes steps until all canvases are done or `last_step` steps were taken."""
        repeated = network.repeat(samples)

        def going_on(state: State) -> Array:
            return (state.step < last_step) & ~jnp.all(state.rows.done)

        def body(state: State) -> State:
            draw_rng, update_rng = (r[state.step] for r in rngs)
            readout, positions, kept = self._read(repeated, state, first_step, draw_rng)
            rows = self._advance(state.rows, readout, update_rng)
            if rows.trajectory is not None:
                trajectory = rows.trajectory.at[:, state.step + 1].set(rows.canvas.tokens)
                rows = rows._replace(trajectory=trajectory)
            cost = state.position_forwards + samples * positions
            return State(state.step + 1, rows, cost, kept)

        first_step = state.step
        if self.active_set is not None:
            state = state._replace(kept=empty_kept(repeated, state.rows.canvas.tokens))
        return jax.lax.while_loop(going_on, body, state)._replace(kept=None)

    def _read(
        self, network: BoundNetwork, state: State, first_step: Array, rng: Array
    ) -> tuple[denoising.CanvasReadout, Array, Kept | None]:
        """Reads the canvases whole, or only what is unsettled of them between two such passes.

        Returns:
          The readout, positions per row that went through the network, and what is kept.
        """
        rows, temperature = state.rows, self._temperature(state.step)
        keep = self.active_set is not None

        def whole() -> tuple[denoising.CanvasReadout, Array, Kept | None]:
            readout, positions, memory = denoising.read_used(
                network,
                rows,
                rng,
                temperature,
                trim_multiple=self.trim_multiple,
                block_logits=self.block_logits,
                keep=keep,
            )
            return readout, positions, Kept(memory, rows.canvas.tokens) if keep else None

        def unsettled() -> tuple[denoising.CanvasReadout, Array, Kept]:
            counts, index = denoising.windows(rows, self.trim_multiple)
            return read_unsettled(
                network,
                state,
                rng,
                temperature,
                active_set=self.active_set,
                window=jnp.array(counts)[index],
                block_logits=self.block_logits,
            )

        if not keep:
            return whole()
        since = state.step - first_step
        return jax.lax.cond(since % self.active_set.refresh_every == 0, whole, unsettled)

    def _advance(self, rows: Rows, readout: denoising.CanvasReadout, rng: Array) -> Rows:
        """The canvases after a step that read them as `readout`."""
        log_prob = readout.argmax_log_prob if self.update.renoises else readout.canvas_log_prob
        score = jnp.sum(log_prob, axis=-1)
        canvas = self.update(rows.canvas, readout, rng, self.corruption.sample_canvas)
        new = rows._replace(canvas=canvas, readout=readout, score=score)
        if self.trim_multiple:
            new = new._replace(used=denoising.count_used(rows, readout.argmax))
        if self.stop is not None:
            seen = Step(rows.canvas.tokens, readout, rows.readout.argmax, score, rows.score)
            done = self.stop(seen)
            argmax = jnp.where(done[:, None], readout.argmax, canvas.tokens)
            text = jnp.where(done[:, None], readout.argmax, canvas.text)
            new = new._replace(canvas=Canvas(argmax, text, canvas.certainty), done=done)
        return denoising.keep_done(new, rows)

    def _temperature(self, step: Array) -> Array | float:
        """Of the draw at step `step`."""
        if self.final_temperature is None:
            return self.temperature
        share = step / max(1, self.num_steps - 1)
        return self.temperature + (self.final_temperature - self.temperature) * share


def _drop(rows: Rows, count: int) -> tuple[Rows, Rows]:
    """The `count` canvases per example that the network is least certain of, and the others.

    Every field is `[batch, samples, ...]`.
    """
    certainty = jnp.sum(rows.readout.argmax_log_prob, axis=-1)
    leaves, treedef = jax.tree.flatten(rows)
    rows = jax.tree.unflatten(treedef, best_last(certainty, *leaves)[1:])
    return jax.tree.map(lambda x: x[:, :count], rows), jax.tree.map(lambda x: x[:, count:], rows)
