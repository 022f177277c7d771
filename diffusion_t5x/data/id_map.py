"""Where a tokenizer's ids are in our networks, for which token 0 is padding.

The rule: token 0 and one token that no text has, `padding`, exchange their places, and all others
keep theirs. It is its own inverse, and the same in tokens and in the rows of embeddings, so weights
that come in and go out again are the same bits. Where no token can be spared, `padding` is the row
after the last one, which is added on the way in and left out on the way out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

import numpy as np

# Names of tokens that were never trained as anything.
_SPARE = re.compile(r"(?i)pad|reserved|unused|placeholder")


@dataclasses.dataclass(frozen=True)
class IdMap:
    """The exchange of token 0 and `padding`, a tokenizer's id; if that is 0, nothing moves."""

    padding: int

    def exchange(self, ids: np.ndarray) -> np.ndarray:
        """Returns our ids of a tokenizer's, or a tokenizer's of ours."""
        ids = np.asarray(ids)
        return np.where(ids == 0, self.padding, np.where(ids == self.padding, 0, ids))

    def import_rows(self, rows: np.ndarray, size: int = 0) -> np.ndarray:
        """Returns our rows of a tokenizer's, `[vocab, ...]`, at least `size`; added ones are 0."""
        ours = np.zeros((max(size, len(rows), self.padding + 1), *rows.shape[1:]), rows.dtype)
        ours[: len(rows)] = rows
        ours[[0, self.padding]] = ours[[self.padding, 0]]
        return ours

    def export_rows(self, rows: np.ndarray, size: int) -> np.ndarray:
        """Returns the `size` rows of a tokenizer's ids of ours, `[vocab, ...]`."""
        return rows[self.exchange(np.arange(size))]


def choose_padding(
    size: int,
    special: Mapping[int, str],
    roles: Mapping[str, int],
    free: Collection[int] = (),
    unknown_may_occur: bool = True,
) -> int:
    """Returns the tokenizer's id that is padding here, a token that no text has.

    In this order: token 0 itself, if it is special and neither begins nor ends texts (nor stands
    for what has no token); the tokenizer's own padding, under the same conditions; a special token
    named as spare; an id of the embedding without a token; one more than there are.

    Args:
      size: The number of the tokenizer's ids.
      special: The contents of special tokens by id.
      roles: The ids of 'bos', 'eos', 'unk' and 'pad', as far as there are such.
      free: Ids that have rows, and no tokens.
      unknown_may_occur: Whether some text has the unknown token.
    """
    names = ("bos", "eos", "unk") if unknown_may_occur else ("bos", "eos")
    used = {roles[name] for name in names if name in roles}
    able = [token for token in sorted(special) if token not in used]
    if 0 in able:
        return 0
    if roles.get("pad") in able:
        return roles["pad"]
    spare = [token for token in able if _SPARE.search(special[token])]
    return next(iter([*spare, *sorted(free)]), size)
