"""Code from a description and one assertion, judged by assertions that were not shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from diffusion_t5x.data import sources
from tasks import metrics, question_answering, translation
from tasks.features import output_features

NAME = "embedded_code"


@seqio.map_over_dataset
def to_text(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    """The description, then the first assertion."""
    shown = tf.strings.regex_replace(example["tests"], r'^\["(.*?)", ".*$', r"\1")
    return {
        "inputs": example["text"] + "\n" + shown + "\n",
        "targets": example["code"],
        "code": example["code"],
        "tests": example["tests"],
    }


def postprocess(text: str, example: Mapping[str, Any], is_target: bool) -> str | dict[str, Any]:
    """Predictions stay text; targets become their assertions and the reference program."""
    if not is_target:
        return text
    return {"tests": json.loads(example["tests"]), "code": example["code"].decode()}


if NAME not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
        NAME,
        source=sources.EmbeddedDataSource(sources.code_files),
        preprocessors=[
            to_text,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=output_features(),
        postprocess_fn=postprocess,
        metric_fns=[metrics.code_passes],
    )
    seqio.MixtureRegistry.add(
        "embedded_all",
        [translation.register_translation("en", "fr"), question_answering.NAME, NAME],
        default_rate=1.0,
    )
