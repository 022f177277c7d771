"""Token by token with a key-value cache: the autoregressive baseline."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.growth import cache_lengths
from diffusion_t5x.decoding.rerank import Decoded, best_last
from diffusion_t5x.interfaces import BoundNetwork

Array = jax.Array
NEGATIVE = -1e10


def filter_logits(logits: Array, top_k: int, top_p: float) -> Array:
    """Rules out all but the `top_k` likeliest tokens and all outside the `top_p` nucleus.

    Args:
      logits: `[batch, vocab]`.
      top_k: tokens to keep; 0 keeps all.
      top_p: the smallest set of likeliest tokens whose probability reaches it is kept (Holtzman et
        al. 2020); 0 or 1 keeps all.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, NEGATIVE, logits)
    if 0.0 < top_p < 1.0:
        descending = jnp.sort(logits, axis=-1)[:, ::-1]
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last, NEGATIVE, logits)
    return logits


@dataclasses.dataclass(frozen=True)
class AutoregressiveDecoder:
    """Greedy, temperature, top-k and nucleus decoding; stops when every row has ended.

    Attributes:
      num_samples: texts per prefix; the prefix is read once for all of them.
      temperature: 0 is greedy.
      top_k: sample among the k likeliest tokens; 0 for all.
      top_p: sample within the nucleus of this probability; 0 for all.
      eos_id: the token that ends a text, what follows it being padding (0); a negative one ends
        none, so that all texts are decoded to their full length.
    """

    num_samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    eos_id: int = 1

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples = {self.num_samples}; expected at least 1.")
        if self.temperature < 0 or self.top_k < 0 or not 0.0 <= self.top_p <= 1.0:
            raise ValueError(
                f"temperature = {self.temperature}, top_k = {self.top_k}, top_p = {self.top_p}; "
                "expected temperature >= 0, top_k >= 0 and 0 <= top_p <= 1."
            )

    def decode(
        self, network: BoundNetwork, length: int, rng: Array, return_trajectory: bool = False
    ) -> Decoded:
        """Decodes up to `length` tokens per prefix; a score is the log-likelihood, in nats.

        Args:
          network: the network, bound to `batch` prefixes.
          length: most tokens, the end-of-text token included.
          rng: for the draws.
          return_trajectory: not to be had: there is no canvas here.

        Raises:
          ValueError: if a trajectory is asked for.
        """
        if return_trajectory:
            raise ValueError("return_trajectory: an autoregressive decoder has no canvas.")
        rows = network.batch_size * self.num_samples
        rngs = jax.random.split(rng, length)

        def emit(index, hidden, tokens, scores, ended):
            logits = network.logits(hidden).astype(jnp.float32)
            token = jnp.where(ended, 0, self.sample(rngs[index], logits))
            log_probs = jax.nn.log_softmax(logits, axis=-1)
            gained = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
            scores += jnp.where(ended, 0.0, gained)
            return tokens.at[:, index].set(token), scores, ended | (token == self.eos_id)

        def body(state):
            index, cache, tokens, scores, ended = state
            cache, hidden = network.step(cache, tokens[:, index - 1])
            return index + 1, cache, *emit(index, hidden, tokens, scores, ended)

        lengths = cache_lengths(length)
        cache, hidden = network.prefill(lengths[0], self.num_samples)
        blank = (jnp.zeros((rows, length), jnp.int32), jnp.zeros(rows), jnp.zeros(rows, bool))
        state = (jnp.int32(1), cache, *emit(0, hidden, *blank))
        for room, end in zip([0, *lengths], lengths, strict=False):
            index, cache, *others = state
            cache = network.grow(cache, end - room) if room else cache
            going_on = lambda state, end=end: (state[0] < end) & ~jnp.all(state[4])  # noqa: E731
            state = jax.lax.while_loop(going_on, body, (index, cache, *others))
        _, _, tokens, scores, _ = state
        tokens = tokens.reshape(network.batch_size, self.num_samples, length)
        scores, tokens = best_last(scores.reshape(tokens.shape[:2]), tokens)
        return Decoded(tokens, scores)

    def sample(self, rng: Array, logits: Array) -> Array:
        """One token per row of `logits [batch, vocab]`: `[batch]` int32."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filter_logits(logits / self.temperature, self.top_k, self.top_p)
        return jax.random.categorical(rng, logits, axis=-1).astype(jnp.int32)
