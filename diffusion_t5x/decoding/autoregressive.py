"""Autoregressive decoding: token by token, with a key-value cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.canvases import best_last
from diffusion_t5x.decoding.lengths import cache_lengths
from diffusion_t5x.decoding.logits_rules import apply_rules, as_rules
from diffusion_t5x.interfaces import Decoded, Fixed, KVCache, LogitsRule, Network

Array = jax.Array


def _refuse_fixed(fixed: Fixed | None) -> None:
    if fixed is not None:
        raise ValueError(
            "fixed positions (the feature decoder_fixed_positions, or FIXED of runs/sample.gin) "
            "with AutoregressiveDecoder, which writes from left to right and cannot know what "
            "follows; use a diffusion objective (objectives/diffusion.gin), or another task."
        )


class _State(NamedTuple):
    """What the loop over tokens carries."""

    emitted: Array  # scalar int32, tokens emitted
    cache: KVCache  # keys and values of the prefixes and of all tokens but the last
    tokens: Array  # [rows, length] int32
    scores: Array  # [rows] float32
    ended: Array  # [rows] bool


@dataclasses.dataclass(frozen=True)
class AutoregressiveDecoder:
    """Greedy decoding and draws; stops when every row has ended.

    Attributes:
      num_samples: texts per prefix; the prefix is read once for all of them.
      temperature: 0 is greedy.
      logits_rules: change the distribution of each token, in order, before the temperature: rules
        of `decoding.logits_rules`. Scores are those without.
      eos_id: the token that ends a text; what follows it is padding (0). A negative one ends none,
        so that all texts are decoded to their full length.
    """

    num_samples: int = 1
    temperature: float = 0.0
    logits_rules: tuple[LogitsRule, ...] = ()
    eos_id: int = 1

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples = {self.num_samples}; expected at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature}; expected a value >= 0.")
        rules = as_rules(self.logits_rules, "AutoregressiveDecoder")
        object.__setattr__(self, "logits_rules", rules)

    def decode(
        self,
        network: Network,
        length: int,
        rng: Array,
        return_trajectory: bool = False,
        fixed: Fixed | None = None,
    ) -> Decoded:
        """Decodes up to `length` tokens, the end of the text included; scores are log-likelihoods.

        Reading the prefix is counted as the pass that gives the first token.

        Raises:
          ValueError: if a trajectory is asked for, since there is no canvas; or if positions are
            fixed, since no token knows what follows it.
        """
        _refuse_fixed(fixed)
        if return_trajectory:
            raise ValueError("return_trajectory: an autoregressive decoder has no canvas.")
        lengths = cache_lengths(length)
        rngs = jax.random.split(rng, length)
        state = self._emit_first(network, length, rngs, lengths[0])
        for room, end in zip([0, *lengths], lengths, strict=False):
            if room:
                state = state._replace(cache=network.add_room(state.cache, end - room))

            def unfinished(state: _State, end: int = end) -> Array:
                return (state.emitted < end) & ~jnp.all(state.ended)

            take_step = functools.partial(self._take_step, network, rngs)
            state = jax.lax.while_loop(unfinished, take_step, state)
        return self.finish(state)

    def count_steps(self, length: int) -> int:
        """Returns the calls of `step` after `start`: see `interfaces.SteppedDecoder`."""
        return length - 1

    def start(
        self, network: Network, length: int, rng: Array, fixed: Fixed | None = None
    ) -> tuple[None, _State]:
        """Reads the prefixes into the state's cache, and draws the first token."""
        _refuse_fixed(fixed)
        return None, self._emit_first(network, length, jax.random.split(rng, length), length)

    def step(self, network: Network, state: _State, rng: Array) -> _State:
        """Draws the next token of each text; what has ended goes on with padding."""
        rngs = jax.random.split(rng, state.tokens.shape[1])
        return self._take_step(network, rngs, state)

    def finish(self, state: _State) -> Decoded:
        """Returns the texts so far."""
        tokens = state.tokens.reshape(-1, self.num_samples, state.tokens.shape[1])
        scores = state.scores.reshape(tokens.shape[:2])
        steps = jnp.full(len(tokens), state.emitted)
        passes = steps * self.num_samples
        return best_last(scores, Decoded(tokens, scores))._replace(
            passes=passes, positions=passes, steps=steps
        )

    def _emit_first(self, network: Network, length: int, rngs: Array, room: int) -> _State:
        """Reads the prefixes into a cache with `room`, and draws the first of `length` tokens."""
        rows = network.batch_size * self.num_samples
        cache, hidden = network.prefill(room, self.num_samples)
        state = _State(
            emitted=jnp.int32(0),
            cache=cache,
            tokens=jnp.zeros((rows, length), jnp.int32),
            scores=jnp.zeros(rows),
            ended=jnp.zeros(rows, bool),
        )
        return self._emit(network, rngs, state, hidden)

    def _take_step(self, network: Network, rngs: Array, state: _State) -> _State:
        """Appends the last token to the cache and draws the next."""
        cache, hidden = network.append_token(state.cache, state.tokens[:, state.emitted - 1])
        return self._emit(network, rngs, state._replace(cache=cache), hidden)

    def _emit(self, network: Network, rngs: Array, state: _State, hidden: Array) -> _State:
        """Draws the token at `state.emitted` from `hidden [rows, embed]`."""
        logits = network.logits(hidden).astype(jnp.float32)
        token = jnp.where(state.ended, 0, self.sample(rngs[state.emitted], logits))
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        gained = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
        return state._replace(
            emitted=state.emitted + 1,
            tokens=state.tokens.at[:, state.emitted].set(token),
            scores=state.scores + jnp.where(state.ended, 0.0, gained),
            ended=state.ended | (token == self.eos_id),
        )

    def sample(self, rng: Array, logits: Array) -> Array:
        """Draws one token per row of `logits [batch, vocab]`: `[batch]` int32."""
        logits = apply_rules(self.logits_rules, logits, self.temperature)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(rng, logits / self.temperature, axis=-1).astype(jnp.int32)
