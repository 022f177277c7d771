"""Logits rules: which tokens may be drawn, and at what odds.

Each is an `interfaces.LogitsRule`: a frozen dataclass whose fields gin binds. A decoder applies its
rules in order to the logits, then divides them by the temperature. Where a rule reads
probabilities, as `TopP`, they are those at that temperature, so that the order is that of
`transformers`: suppressed and penalised tokens, temperature, top-k, top-p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.interfaces import LogitsRule

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps the `k` likeliest tokens, and what is as likely as the last of them."""

    k: int

    def __post_init__(self):
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopK.k = {self.k}; expected at least 1, or TOP_K = None for all.")

    def __call__(self, logits: Array, temperature: Array | float) -> Array:
        """Returns -inf for all other tokens."""
        del temperature
        if self.k >= logits.shape[-1]:
            return logits
        kth = jax.lax.top_k(logits, self.k)[0][..., -1:]
        return jnp.where(logits < kth, -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class TopP:
    """Keeps the nucleus: the fewest likeliest tokens whose probability reaches `p` (arXiv
    1904.09751, section 3.1), and what is as likely as the last of them."""

    p: float

    def __post_init__(self):
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"TopP.p = {self.p}; expected 0 < p <= 1, or TOP_P = None for all.")

    def __call__(self, logits: Array, temperature: Array | float) -> Array:
        """Returns -inf for all other tokens; at temperature 0 the argmax is drawn in any case."""
        greedy = isinstance(temperature, int | float) and temperature == 0
        if greedy or self.p == 1.0:
            return logits
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending / temperature, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.min(jnp.where(before < self.p, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < last, -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class Suppress:
    """Never draws `tokens`, such as the end of the text, or padding."""

    tokens: tuple[int, ...]

    def __post_init__(self):
        _check_tokens("Suppress.tokens", self.tokens)
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def __call__(self, logits: Array, temperature: Array | float) -> Array:
        """Returns -inf for them."""
        del temperature
        return jnp.where(np.isin(np.arange(logits.shape[-1]), self.tokens), -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class Penalize:
    """Takes so many nats from the logits of tokens, at temperature 1; negative ones favour them.

    Attributes:
      nats: `{token: nats}`.
    """

    nats: Mapping[int, float] | tuple[tuple[int, float], ...]

    def __post_init__(self):
        nats = dict(self.nats)
        _check_tokens("Penalize.nats", nats)
        if not (np.abs(list(nats.values())) < 1e30).all():  # in float32, sums of some too
            raise ValueError(
                f"Penalize.nats = {nats}; expected values within 1e30, or use Suppress."
            )
        object.__setattr__(self, "nats", tuple(nats.items()))  # as frozen as the rule

    @property
    def tokens(self) -> tuple[int, ...]:
        """Returns the tokens that are penalised."""
        return tuple(dict(self.nats))

    def __call__(self, logits: Array, temperature: Array | float) -> Array:
        """Returns the logits less the penalties."""
        del temperature
        penalties = np.zeros(logits.shape[-1], np.float32)
        penalties[list(self.tokens)] = list(dict(self.nats).values())
        return logits - penalties


def sampling_rules(
    top_k: int | None = None, top_p: float | None = None, suppress: Sequence[int] = ()
) -> tuple[LogitsRule, ...]:
    """Returns the rules of the macros SUPPRESS, TOP_K and TOP_P, in this order; none by default."""
    rules: list[LogitsRule] = []
    if isinstance(suppress, int) or suppress:
        rules.append(Suppress(suppress))  # type: ignore[arg-type]
    if top_k is not None:
        rules.append(TopK(top_k))
    if top_p is not None:
        rules.append(TopP(top_p))
    return tuple(rules)


def apply_rules(rules: Sequence[LogitsRule], logits: Array, temperature: Array | float) -> Array:
    """Applies `rules` in order to `logits [..., vocab]`, for a draw at `temperature`."""
    for rule in rules:
        logits = rule(logits, temperature)
    return logits


def as_rules(rules: Sequence[LogitsRule], owner: str) -> tuple[LogitsRule, ...]:
    """Returns `rules` as a tuple.

    Raises:
      ValueError: if they are no sequence of rules; `owner` is the decoder that has them.
    """
    rules = tuple(rules) if isinstance(rules, Sequence) else rules
    if not isinstance(rules, tuple) or not all(map(is_rule, rules)):
        raise ValueError(
            f"{owner}.logits_rules = {rules!r}; expected a tuple of rules of "
            "diffusion_t5x.decoding.logits_rules."
        )
    return rules


def is_rule(rule: object) -> bool:
    """Returns whether `rule` can be called as one; a class cannot, only what it makes."""
    return callable(rule) and not isinstance(rule, type)


def check_rules(
    rules: Sequence[LogitsRule], vocab_size: int, forbidden: Sequence[int] = ()
) -> None:
    """Checks rules against the vocabulary of a network that never predicts `forbidden`.

    Raises:
      ValueError: if they name tokens outside it, or leave no token of it to draw.
    """
    for rule in rules:
        unknown = [token for token in getattr(rule, "tokens", ()) if token >= vocab_size]
        if unknown:
            raise ValueError(
                f"logits_rules: {rule!r} names the tokens {unknown}; expected tokens below the "
                f"network's vocab_size = {vocab_size}."
            )
    suppressed = {t for rule in rules if isinstance(rule, Suppress) for t in rule.tokens}
    if rules and suppressed.union(forbidden).issuperset(range(vocab_size)):
        raise ValueError(
            f"logits_rules: all {vocab_size} tokens are suppressed; expected one that is not."
        )


def _check_tokens(setting: str, tokens: Any) -> None:
    """Checks that `tokens` are whole numbers >= 0, at least one."""
    listed = list(tokens) if isinstance(tokens, Sequence | Mapping) else [tokens]
    types = {type(token) for token in listed}
    whole = bool(types) and all(issubclass(t, int | np.integer) and t is not bool for t in types)
    if not isinstance(tokens, Sequence | Mapping) or not whole or min(listed) < 0:
        raise ValueError(f"{setting} = {tokens!r}; expected tokens, whole numbers >= 0.")
