"""The features that all tasks here have."""

from __future__ import annotations

import seqio

from diffusion_t5x.data.vocabularies import get_vocabulary


def output_features() -> dict[str, seqio.Feature]:
    """'inputs' and 'targets' under the configured vocabulary.

    Targets end with an end-of-text token. Inputs do not: a decoder-only network reads
    `[inputs; targets]` as one text, which ends only once.
    """
    vocabulary = get_vocabulary()
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=False, required=False),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }
