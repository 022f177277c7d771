"""Likelihoods of texts, and what they are together: bits per token and perplexity, with errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

_MEASURES = ("perplexity", "bits_per_token", "nats_per_text")
# What `summarize` returns.
LIKELIHOOD_KEYS = (*_MEASURES, *(f"{name}_error" for name in _MEASURES))


class Likelihood(NamedTuple):
    """What a model says of one text; see `models.Model.score_batch_with_aux`."""

    score: float  # log-likelihood in nats, or the estimate of a lower bound of it
    error: float  # standard error of the estimate in nats; 0 where the score is exact
    tokens: int  # tokens of the text, its end among them


def fields(likelihood: Likelihood) -> dict[str, Any]:
    """Returns a likelihood as fields of a line; a text without tokens has no bits per token."""
    score, _, tokens = likelihood
    bits = -score / math.log(2) / tokens if tokens else None
    return {**likelihood._asdict(), "bits_per_token": bits}


def of_line(line: str) -> Likelihood:
    """Returns the likelihood of a JSON line that has its `fields`."""
    record = json.loads(line)
    return Likelihood(*(record[name] for name in Likelihood._fields))


def summarize(likelihoods: Iterable[Likelihood]) -> dict[str, float]:
    """Computes what texts cost together: every token weighs the same, whichever text it is of.

    With `s` the mean of minus the score per token, bits per token are `s / log 2` and the
    perplexity is `exp(s)`. Of bounds, both are upper bounds.

    Returns:
      'perplexity', 'bits_per_token' and 'nats_per_text', each with the standard error of its Monte
      Carlo estimate under its name and '_error' (the perplexity's to first order). It says nothing
      about which texts were chosen. Without a text, or without a token, there is nothing.
    """
    found = [*likelihoods]
    if not any(one.tokens for one in found):
        return {}
    scores, errors, tokens = zip(*found, strict=True)
    nats, error = -math.fsum(scores), math.hypot(*errors)
    per_token, error_per_token = nats / sum(tokens), error / sum(tokens)
    perplexity = math.exp(per_token) if per_token < 700 else math.inf
    return {
        "perplexity": perplexity,
        "perplexity_error": perplexity * error_per_token if error else 0.0,
        "bits_per_token": per_token / math.log(2),
        "bits_per_token_error": error_per_token / math.log(2),
        "nats_per_text": nats / len(scores),
        "nats_per_text_error": error / len(scores),
    }


def describe(name: str, likelihoods: Iterable[Likelihood]) -> str:
    """Returns a line about the texts of `name`, for people."""
    found = [*likelihoods]
    values = summarize(found)
    if not values:
        return f"{name}: no token to score in {len(found):,} texts."

    def shown(key: str) -> str:
        error = values[f"{key}_error"]
        return f"{values[key]:.4g}" + (f" ± {error:.2g}" if error else "")

    return (
        f"{name}: {len(found):,} texts, {sum(one.tokens for one in found):,} tokens; "
        f"{shown('nats_per_text')} nats per text, {shown('bits_per_token')} bits per token, "
        f"perplexity {shown('perplexity')}"
    )
