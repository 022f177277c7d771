"""Extractive question answering about the standard library's signatures and docstrings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from diffusion_t5x.data import sources
from tasks import metrics
from tasks.features import output_features

NAME = "embedded_qa"


@seqio.map_over_dataset
def to_text(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    """The question first, then the context in which to find its answer."""
    return {
        "inputs": example["question"] + "\n" + example["context"] + "\n",
        "targets": example["answer"],
        "answer": example["answer"],
    }


def postprocess(text: str, example: Mapping[str, Any], is_target: bool) -> str | list[str]:
    """Predictions stay text; targets become the list of reference answers."""
    return [example["answer"].decode()] if is_target else text


if NAME not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
        NAME,
        source=sources.EmbeddedDataSource(sources.question_files),
        preprocessors=[
            to_text,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=output_features(),
        postprocess_fn=postprocess,
        metric_fns=[metrics.squad],
    )
