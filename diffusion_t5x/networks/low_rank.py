"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): what is adapted and trained.

A chosen projection computes `x W + (alpha / rank) x A B` (section 4.1): its kernel `W` is frozen,
`A [in, rank]` begins random and `B [rank, out]` as zero, so that training starts from the network
as it was. `layers.Dense` holds them, as `low_rank_a`, `low_rank_b` and, so that a checkpoint can be
merged without its settings, `low_rank_scale = alpha / rank`, which is not trained.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from diffusion_t5x.names import did_you_mean

TRAINED = ("low_rank_a", "low_rank_b")
SCALE = "low_rank_scale"


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Low-rank adaptation of chosen projections; all other parameters are frozen.

    Patterns are regular expressions for the end of a name, whole parts between slashes:
    'self_attention/query' and 'layers_[01]/mlp/.*' are, 'attention/query' is none. A single one may
    be given as it is.
    """

    projections: Sequence[str] | str = (".*attention/(query|key|value|out)",)
    """Patterns of the projections, such as 'self_attention/query' or 'mlp/wo'."""
    rank: int = 8
    """Width of the product of two matrices that is added to a kernel."""
    alpha: float = 16.0
    """The product is multiplied by `alpha / rank`."""
    also_trained: Sequence[str] | str = ()
    """Patterns of other parameters that are trained, such as 'token_embedder/embedding', or
    '.*_layer_norm/scale' for all norms."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(
                f"LowRank: rank = {self.rank}, alpha = {self.alpha}; expected a rank of at least 1 "
                "and an alpha above 0."
            )
        for setting in ("projections", "also_trained"):
            value = getattr(self, setting)
            patterns = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, setting, patterns)
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"LowRank.{setting} has {pattern!r}, which is no regular expression: "
                        f"{error}."
                    ) from error
        if not self.projections:
            raise ValueError("LowRank.projections is empty; expected at least one pattern.")

    def adapts(self, path: Sequence[str]) -> bool:
        """Returns whether the projection at `path`, such as ('mlp', 'wo'), gets two factors."""
        return any(_matches(pattern, "/".join(path)) for pattern in self.projections)

    def trains(self, name: str) -> bool:
        """Returns whether a parameter, such as 'decoder/final_layer_norm/scale', is trained."""
        own = name.rpartition("/")[2]
        if own in (*TRAINED, SCALE):
            return own != SCALE
        return any(_matches(pattern, name) for pattern in self.also_trained)

    def check(self, names: Iterable[str]) -> None:
        """Refuses patterns that match nothing among the names of a network's parameters.

        Raises:
          ValueError: Naming the pattern, the nearest name, and all names without their layer.
        """
        others = [name for name in names if name.rpartition("/")[2] not in (*TRAINED, SCALE)]
        kernels = [n.removesuffix("/kernel") for n in others if n.endswith("/kernel")]
        for setting, known in (("projections", kernels), ("also_trained", others)):
            for pattern in getattr(self, setting):
                if not any(_matches(pattern, name) for name in known):
                    ends = sorted({"/".join(name.split("/")[-2:]) for name in known})
                    raise ValueError(
                        f"LowRank.{setting} has {pattern!r}, which matches nothing of this "
                        f"network; {did_you_mean(pattern, ends)}"
                    )


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(?:.*/)?(?:{pattern})", name) is not None
