"""Diffusion decoding: denoise random canvases in parallel, return the best-scored one last.

```
prior ─► canvas ─► read ─► update ─► score ─► trim ─► stop? ─► ranked samples
           ▲                                            │
           └──────────────── next step ◄────────────────┘
```

The defaults are the paper's sampler. Every other setting makes it cheaper or samples otherwise;
`docs/decoding.md` says what each costs and gains.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding import canvases
from diffusion_t5x.decoding.block_decoding import decode_blocks
from diffusion_t5x.decoding.guidance import guide
from diffusion_t5x.decoding.logits_rules import as_rules, is_rule
from diffusion_t5x.decoding.readout import read_canvas
from diffusion_t5x.decoding.updates import ResampleAll
from diffusion_t5x.interfaces import (
    CachedNetwork,
    Canvas,
    Corruption,
    Decoded,
    Fixed,
    LogitsRule,
    Network,
    StepView,
    StopRule,
    UpdateRule,
)
from diffusion_t5x.names import check_known

Array = jax.Array
SCORED = ("canvas", "text")


class _State(NamedTuple):
    """What the loop over steps carries: scalars int32, and the canvases."""

    step: Array  # steps taken
    passes: Array  # forward passes over canvases, per example
    positions: Array  # canvas positions in them, per example
    canvas: Canvas
    fixed: Fixed | None  # [batch, length] each


@dataclasses.dataclass(frozen=True)
class DiffusionDecoder:
    """Denoises `num_samples` random canvases per prefix for `num_steps` steps.

    The defaults draw every position at each step (arXiv 2401.17181, section 4.1).

    Attributes:
      corruption: the noise of the first canvas.
      num_steps: denoising steps at most, each one pass over the whole canvas.
      num_samples: canvases per example, denoised side by side.
      temperature: temperature of the draw at each step; 0 is the argmax.
      final_temperature: temperature of the last step's draw, reached linearly; None keeps
        `temperature`.
      logits_rules: change the distribution of each draw and of the argmax, in order, before the
        temperature: rules of `decoding.logits_rules`.
      update: what a step writes into a canvas, a rule of `decoding.updates`.
      stop: when a canvas is done before its steps are over, a rule of `decoding.stopping`; None
        for never. Decoding ends when all canvases of the batch are done.
      halve_every: steps after which the less certain half of the canvases is dropped, repeatedly,
        until one is left; 0 keeps all to the end.
      trim_multiple: leave out the padding that ends all canvases of the batch and that the network
        would write again; the positions read are the next of `lengths.bucket_lengths` of this
        number. 0 never trims.
      prefix_cache: compute the prefix's keys and values once, for all samples and steps. The
        numbers are the same; the objective's attention pattern must hide the canvas from the
        prefix.
      block_length: tokens of a canvas for a text that is written block by block, where each
        finished block joins the cached prefix of the next (`decoding.block_decoding`); 0 for one
        canvas. Needs `prefix_cache`, and a model trained with blocks of this length.
      guidance_scale: how far predictions move from those without a prefix to those with it, and
        beyond (`decoding.guidance`); 1 for the latter. Else each pass counts twice, being one with
        and one without. Train with `StepUnrolledDenoising.prefix_drop_rate`.
      eos_id: the token that ends a text, after which no block is written; a negative one ends none.
      scored: 'canvas' scores all of it; 'text' what a sample has up to its first `eos_id`, that
        included. The rest is then taken for padding of a certain network by scores, stop rules,
        `halve_every` and `trim_multiple`; for models that were trained without it.
      pad_after_eos: write padding after the first `eos_id` of each text, at each step.
      block_logits: logits per canvas that may exist at once; longer canvases are read in chunks of
        positions.
    """

    corruption: Corruption
    num_steps: int = 10
    num_samples: int = 8
    temperature: float = 0.2
    final_temperature: float | None = None
    logits_rules: tuple[LogitsRule, ...] = ()
    update: UpdateRule = ResampleAll()
    stop: StopRule | None = None
    halve_every: int = 0
    trim_multiple: int = 0
    prefix_cache: bool = False
    block_length: int = 0
    guidance_scale: float = 1.0
    eos_id: int = -1
    scored: str = "canvas"
    pad_after_eos: bool = False
    block_logits: int = 2**22

    def __post_init__(self):
        for name in ("num_steps", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        for name in (
            "temperature", "halve_every", "trim_multiple", "block_length", "guidance_scale"
        ):  # fmt: skip
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
        if self.block_length and not self.prefix_cache:
            raise ValueError(
                "block_length needs cached prefixes; set prefix_cache = True, and train with "
                "blocks (objectives/diffusion_blocks.gin)."
            )
        check_known(self.scored, SCORED, "DiffusionDecoder.scored")
        if self.eos_id < 0 and (self.scored == "text" or self.pad_after_eos):
            raise ValueError(
                f"DiffusionDecoder.eos_id = {self.eos_id} with scored = {self.scored!r} and "
                f"pad_after_eos = {self.pad_after_eos}; expected the token that ends a text."
            )
        for name, module in (("update", "updates"), ("stop", "stopping")):
            rule = getattr(self, name)
            if not is_rule(rule) and (name, rule) != ("stop", None):
                raise ValueError(
                    f"{name} = {rule!r}; expected a rule of diffusion_t5x.decoding.{module}."
                )
        object.__setattr__(self, "logits_rules", as_rules(self.logits_rules, "DiffusionDecoder"))
        if check := getattr(self.update, "check", None):
            check(self.corruption)

    def decode(
        self,
        network: Network,
        length: int,
        rng: Array,
        return_trajectory: bool = False,
        fixed: Fixed | None = None,
    ) -> Decoded:
        """Decodes one text per prefix and sample, scored by the update rule.

        A text written in blocks has one sample, whose blocks are each the best of their canvases
        and whose scores add up. Fixed positions are in every canvas from the first on, whatever the
        rules; to rules and scores the network is certain of them.

        Raises:
          ValueError: if prefixes cannot be cached under the objective's attention pattern.
        """
        if self.guidance_scale != 1:
            network = cast(Network, guide(network, self.guidance_scale))
        decode_canvas = functools.partial(
            self._decode_canvas,
            length=self.block_length or length,
            return_trajectory=return_trajectory,
        )
        if self.block_length:
            return decode_blocks(
                network.cache_prefix(),
                length,
                rng,
                decode_canvas,
                block_length=self.block_length,
                eos_id=self.eos_id,
                fixed=fixed,
            )
        network = network.cache_prefix() if self.prefix_cache else network
        return decode_canvas(network, rng, fixed)

    def _decode_canvas(
        self,
        network: Network,
        rng: Array,
        fixed: Fixed | None,
        length: int,
        return_trajectory: bool,
    ) -> Decoded:
        """Decodes canvases of `length` tokens: see `decode`."""
        batch_size = network.batch_size
        canvas_rng, rngs = self._split(rng)
        state = self._first_canvas(network, length, canvas_rng, return_trajectory, fixed)
        finished = []
        first_step = 0
        for samples, last_step in self._stages():
            take_step = functools.partial(self._take_step, network.repeat(samples), samples, rngs)
            state = self._take_steps(take_step, first_step, last_step, state)
            first_step = last_step
            canvas = canvases.fill_trajectory(state.canvas, state.step)
            canvas = jax.tree.map(lambda x: x.reshape(batch_size, -1, *x.shape[1:]), canvas)
            if last_step < self.num_steps:
                dropped, canvas = canvases.drop_uncertain(canvas, samples // 2)
                finished.append(dropped)
                rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), canvas)
                state = state._replace(canvas=rows)
        finished.append(canvas)
        canvas = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *finished)
        canvas = canvases.best_last(canvas.score, canvas)
        return Decoded(
            tokens=canvas.text,
            scores=canvas.score,
            trajectory=canvas.trajectory,
            passes=jnp.full(batch_size, state.passes),
            positions=jnp.full(batch_size, state.positions),
            steps=jnp.full(batch_size, state.step),
        )

    def count_steps(self, length: int) -> int:
        """Returns the calls of `step` after `start`: see `interfaces.SteppedDecoder`.

        Raises:
          ValueError: if steps differ in shape, as with `block_length` and `halve_every`, or read
            two networks.
        """
        del length
        for name, reason in (
            ("block_length", "whose prefix grows with each block"),
            ("halve_every", "which drops canvases between steps"),
        ):
            if value := getattr(self, name):
                raise ValueError(
                    f"DiffusionDecoder.{name} = {value}, {reason}; expected 0: a step alone reads "
                    "and writes all canvases of a text, whose shapes never change."
                )
        if self.guidance_scale != 1:
            raise ValueError(
                f"DiffusionDecoder.guidance_scale = {self.guidance_scale}; expected 1: a step "
                "alone reads one network."
            )
        return self.num_steps

    def start(
        self, network: Network, length: int, rng: Array, fixed: Fixed | None = None
    ) -> tuple[Network | CachedNetwork, _State]:
        """Draws the first canvases; with `prefix_cache`, reads the prefixes into a cache."""
        network = network.cache_prefix() if self.prefix_cache else network
        canvas_rng, _ = self._split(rng)
        return network, self._first_canvas(network, length, canvas_rng, False, fixed)

    def step(self, network: Network, state: _State, rng: Array) -> _State:
        """Takes a denoising step; canvases that are done stay as they are."""
        rngs = self._split(rng)[1]
        return self._take_step(network.repeat(self.num_samples), self.num_samples, rngs, state)

    def finish(self, state: _State) -> Decoded:
        """Returns the texts of the canvases so far."""
        text, scores = state.canvas.text, state.canvas.score
        scores = scores.reshape(-1, self.num_samples)
        return canvases.best_last(scores, Decoded(text.reshape(*scores.shape, -1), scores))

    def _split(self, rng: Array) -> tuple[Array, tuple[Array, Array]]:
        """Returns the key of the first canvases, and those of each step's draws and updates."""
        canvas_rng, draws_rng, updates_rng = jax.random.split(rng, 3)
        draws, updates = (jax.random.split(rng, self.num_steps) for rng in (draws_rng, updates_rng))
        return canvas_rng, (draws, updates)

    def _first_canvas(
        self,
        network: Network,
        length: int,
        rng: Array,
        return_trajectory: bool,
        fixed: Fixed | None,
    ) -> _State:
        noise = self.corruption.prior(rng, (network.batch_size * self.num_samples, length))
        rows = _repeat(fixed, self.num_samples)
        if rows is not None:
            noise = jnp.where(rows.where, rows.tokens, noise)
        conditioning = None
        if network.self_conditioning:

            def predict(noise: Array) -> Array:
                read = network.repeat(self.num_samples)
                return read.expect_embedding(read.forward(noise, None))

            shape = jax.eval_shape(predict, noise)
            conditioning = jnp.zeros(shape.shape, shape.dtype)
        canvas = canvases.start(noise, self.num_steps, return_trajectory, conditioning)
        if getattr(self.update, "needs_margin", False):
            margin = jnp.zeros(noise.shape)
            canvas = canvas._replace(readout=canvas.readout._replace(margin=margin))
        zero = jnp.int32(0)
        return _State(zero, zero, zero, canvases.impose(canvas, rows), fixed)

    def _stages(self) -> list[tuple[int, int]]:
        """Returns pairs: the canvases per example, and the step up to which there are that many."""
        stages, samples, step = [], self.num_samples, self.halve_every
        while 0 < step < self.num_steps and samples > 1:
            stages.append((samples, step))
            samples -= samples // 2
            step += self.halve_every
        return [*stages, (samples, self.num_steps)]

    def _take_steps(
        self, take_step: Callable[[_State], _State], first_step: int, last_step: int, state: _State
    ) -> _State:
        """Takes steps until all canvases are done or `last_step` steps were taken."""
        if self.stop is None and not getattr(self.update, "finishes", False):
            # The number of steps is known, so that a GPU need not tell the host before each.
            return jax.lax.fori_loop(first_step, last_step, lambda _, x: take_step(x), state)

        def unfinished(state: _State) -> Array:
            return (state.step < last_step) & ~jnp.all(state.canvas.done)

        return jax.lax.while_loop(unfinished, take_step, state)

    def _take_step(
        self, network: Network, samples: int, rngs: Sequence[Array], state: _State
    ) -> _State:
        """Takes one step of `samples` canvases per prefix."""
        old, fixed = state.canvas, _repeat(state.fixed, samples)
        draw_rng, update_rng = (r[state.step] for r in rngs)
        # Read: one pass of the network, and a draw for each position.
        readout, conditioning, positions = read_canvas(
            network,
            old,
            draw_rng,
            self._temperature(state.step),
            trim_multiple=self.trim_multiple,
            chunk_logits=self.block_logits,
            rules=self.logits_rules,
        )
        readout = canvases.impose_on_readout(readout, fixed)
        view = StepView(old, readout, state.step, self.num_steps)
        # Update and score.
        new, score = self.update(view, update_rng, self.corruption)
        keeps_text = getattr(self.update, "keeps_text", False)
        if self.scored == "text":
            text = new.text if keeps_text else None
            old, readout = canvases.keep_text(old, readout, self.eos_id, fixed, text)
            view = view._replace(canvas=old, readout=readout)
            _, score = self.update(view, update_rng, self.corruption)
        new = new._replace(readout=readout, score=score, conditioning=conditioning)
        new = canvases.impose(new, fixed)
        # Trim: padding that the network writes again leaves the computation.
        if self.trim_multiple:
            new = new._replace(used=canvases.count_used(old, readout.argmax))
        # Stop: a canvas that is done keeps the argmax of this step, or the rule's own text.
        if self.stop is not None:
            done = self.stop(view, score)
            kept = new.text if keeps_text else readout.argmax
            tokens, text = (jnp.where(done[:, None], kept, x) for x in (new.tokens, new.text))
            new = new._replace(tokens=tokens, text=text, done=done | new.done)
        if self.pad_after_eos:
            new = canvases.pad_ended(new, self.eos_id, fixed)
        networks = 1 if self.guidance_scale == 1 else 2
        # Keep what was done before, and what is to be shown.
        new = canvases.record(canvases.keep_done(new, state.canvas), state.step)
        return _State(
            step=state.step + 1,
            passes=state.passes + samples * networks,
            positions=state.positions + samples * networks * positions,
            canvas=new,
            fixed=state.fixed,
        )

    def _temperature(self, index: Array) -> Array | float:
        """Returns the temperature of the draw at step `index`."""
        if self.final_temperature is None:
            return self.temperature
        share = index / max(1, self.num_steps - 1)
        return self.temperature + (self.final_temperature - self.temperature) * share


def _repeat(fixed: Fixed | None, samples: int) -> Fixed | None:
    """Returns the fixed positions of each row, from those of each prefix."""
    return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), fixed)
