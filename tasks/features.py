"""The features and the registration that all tasks here share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import seqio
import tensorflow as tf

from diffusion_t5x.data.vocabularies import get_vocabulary


def output_features() -> dict[str, seqio.Feature]:
    """Returns the features 'inputs' and 'targets', with the configured vocabulary.

    Targets end with an end-of-text token. Inputs do not: a decoder-only network reads
    `[inputs; targets]` as one text, which ends once.
    """
    vocabulary = get_vocabulary()
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=False, required=False),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }


def register(
    name: str,
    source: seqio.DataSource,
    preprocessors: Sequence[Callable[..., tf.data.Dataset]],
    **kwargs: Any,
) -> str:
    """Registers a task unless it is registered, and returns its name.

    Args:
      name: The name of the task.
      source: The source of its examples.
      preprocessors: Preprocessors from examples to the tokens 'inputs' and 'targets'; the
        end-of-text token is added after them.
      **kwargs: Further arguments of `seqio.TaskRegistry.add`.
    """
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=[*preprocessors, seqio.preprocessors.append_eos_after_trim],
            output_features=output_features(),
            **kwargs,
        )
    return name
