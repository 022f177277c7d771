"""The languages of a multilingual corpus and their mixing rates.

It is no module of `tasks`, since gin imports it before its bindings apply, and importing `tasks`
registers tasks with the vocabulary that is bound then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import seqio

import gin
from diffusion_t5x.names import check_known


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LanguageMixture:
    """The languages to read, each at the rate size^alpha (Xue et al. 2021, section 3.1).

    Attributes:
      languages: Codes of languages in the corpus; None for all of its languages.
      alpha: The exponent: 1 draws languages in proportion to their documents, 0 draws all at the
        same rate; mT5's is 0.3.
    """

    languages: Sequence[str] | None = None
    alpha: float = 0.3

    def choose(self, known: Sequence[str]) -> tuple[str, ...]:
        """Returns the languages to read of those of the corpus.

        Raises:
          ValueError: if a language is unknown, or none is given; the message offers the nearest.
        """
        if self.languages is None:
            return tuple(known)
        if isinstance(self.languages, str) or not self.languages:
            raise ValueError(
                f"languages = {self.languages!r}; expected a tuple such as ('en', 'fr'), or None."
            )
        for language in self.languages:
            check_known(language, known, "MC4_LANGUAGES: language")
        return tuple(dict.fromkeys(self.languages))

    def rate(self, task: seqio.Task) -> float:
        """Returns a language's rate: the number of its training documents to the power `alpha`."""
        return float(seqio.mixing_rate_num_examples(task, temperature=1.0)) ** self.alpha
