"""What decoding costs: sums over examples, and the metrics that they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from diffusion_t5x.models import COSTS

# What decoding took, summed over examples and candidates: 'seconds', and what decoders count.
Costs: TypeAlias = Mapping[str, float]


def sum_costs(costs: Iterable[Costs], seconds: float) -> Costs:
    """Sums what predictions cost, and adds the seconds that all took."""
    total = {"seconds": seconds}
    for of_one in costs:
        for name, cost in of_one.items():
            total[name] = total.get(name, 0.0) + cost
    return total


def cost_metrics(costs: Costs, num_examples: int) -> dict[str, float]:
    """Returns what decoding an example cost, all its samples and candidates together.

    'decode_seconds_per_example' leaves compilation out. Where the decoder counts them,
    'decode_steps_per_example' are passes that had to wait for one another, 'decode_passes_' and
    'decode_positions_per_example' those of `interfaces.Decoded`, and 'decode_tokens_per_pass' the
    tokens of the best text, its end included and what was given not, for each pass.
    """
    values = {
        f"decode_{name}_per_example": costs[name] / num_examples
        for name in ("seconds", *COSTS)
        if name in costs
    }
    if costs.get("passes"):
        values["decode_tokens_per_pass"] = costs["tokens"] / costs["passes"]
    return values
