"""How much of each language a multilingual corpus gives."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import seqio

import gin


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LanguageMixture:
    """The languages to read, each at the rate size^alpha (Xue et al. 2021, section 3.1).

    Attributes:
      languages: codes as the corpus has them; None for all of its languages.
      alpha: 1 draws languages in proportion to their documents, 0 alike; mT5's is 0.3.
    """

    languages: Sequence[str] | None = None
    alpha: float = 0.3

    def choose(self, known: Sequence[str]) -> tuple[str, ...]:
        """The languages to read, of those `known`.

        Raises:
          ValueError: if one is unknown, or there is none; the message offers the nearest.
        """
        if self.languages is None:
            return tuple(known)
        if isinstance(self.languages, str) or not self.languages:
            raise ValueError(
                f"languages = {self.languages!r}; expected a tuple such as ('en', 'fr'), or None."
            )
        for language in self.languages:
            if language not in known:
                near = difflib.get_close_matches(language, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"language {language!r} is not in the corpus; {hint}Known: {', '.join(known)}."
                )
        return tuple(dict.fromkeys(self.languages))

    def rate(self, task: seqio.Task) -> float:
        """The rate of a language's task: its number of training documents to the power `alpha`."""
        return float(seqio.mixing_rate_num_examples(task, temperature=1.0)) ** self.alpha
