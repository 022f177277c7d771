"""Extractive question answering: SQuAD v1.1, and signatures of the standard library."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from diffusion_t5x.data import preprocessors
from diffusion_t5x.data.embedded import sources
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.files.local_files import LocalFilesDataSource
from diffusion_t5x.data.tfds_source import TfdsDataSource

from . import metrics
from .features import register

EMBEDDED = "embedded_qa"
SQUAD = "squad_v1_1"
SQUAD_TFDS = "squad/v1.1:3.0.0"


@seqio.map_over_dataset
def to_text(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    """Puts the question before the context that holds its answer.

    Args:
      example: 'context', 'question', and 'answers' `[n]`, the first of which is the target.
    """
    return {
        "inputs": example["question"] + "\n" + example["context"] + "\n",
        "targets": example["answers"][0],
        "answers": example["answers"],
    }


def postprocess(text: str, example: Mapping[str, Any], is_target: bool) -> str | list[str]:
    """Turns targets into lists of reference answers, and returns predictions unchanged."""
    return [answer.decode() for answer in example["answers"]] if is_target else text


def _from_tfds(example: Mapping[str, Any]) -> Mapping[str, tf.Tensor]:
    answers = example["answers"]["text"]
    return {"context": example["context"], "question": example["question"], "answers": answers}


@seqio.map_over_dataset
def _single_answer(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    return {**example, "answers": example["answer"][None]}


STEPS = (to_text, preprocessors.tokenize)
register(
    EMBEDDED,
    sources.EmbeddedDataSource(sources.question_files),
    [_single_answer, *STEPS],
    postprocess_fn=postprocess,
    # Many answers, such as the parameter `a` or the default `()`, are empty once normalised.
    metric_fns=[functools.partial(metrics.squad, f1_of_nothing=1.0)],
)
register(
    SQUAD,
    LocalFilesDataSource(
        "squad_v1_1",
        lambda settings: readers.Squad(),
        TfdsDataSource(SQUAD_TFDS, splits=("train", "validation")),
        _from_tfds,
    ),
    STEPS,
    postprocess_fn=postprocess,
    metric_fns=[metrics.squad],
)
