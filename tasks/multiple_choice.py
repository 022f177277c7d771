"""Questions with several answers to choose from, ranked by their likelihoods; from your files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from diffusion_t5x.data import preprocessors
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.files.local_files import LocalFilesDataSource

from . import metrics
from .features import register

NAME = "multiple_choice"


class _Ranked(LocalFilesDataSource):
    """Questions for evaluation alone."""

    def get_dataset(
        self, split: str = "train", shuffle: bool = True, *args: Any, **kwargs: Any
    ) -> tf.data.Dataset:
        """Returns the questions of a split in the order of the files.

        Raises:
          ValueError: if they are to be shuffled, as for training.
        """
        if shuffle:
            raise ValueError(
                f"task {NAME!r} has an example for each choice, the wrong ones too; it can be "
                "evaluated, and not trained on."
            )
        return super().get_dataset(split, shuffle, *args, **kwargs)


def _files_needed() -> Mapping[str, Any]:
    raise ValueError(
        f"task {NAME!r} reads your files: set LOCAL_FILES = {{{NAME!r}: {{'test': FILES}}}}, of "
        "JSON lines with 'question', 'choices' and 'answer'."
    )


def one_example_per_choice(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes an example of every choice, whose target it is.

    Args:
      dataset: 'question', 'choices' `[n]`, and 'answer', the number of one from 0, as a text.

    Returns:
      Examples with 'inputs' and 'targets', and the whole numbers 'question' (of the question among
      all), 'choice' (the number of this choice), 'num_choices' and 'answer'.
    """

    def choices(number: tf.Tensor, example: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        texts = example["choices"]
        common = {
            "inputs": example["question"] + "\n",
            "question": number,
            "num_choices": tf.size(texts),
            "answer": tf.strings.to_number(example["answer"], tf.int32),
        }
        numbers = tf.data.Dataset.range(tf.size(texts, tf.int64))
        return numbers.map(lambda choice: {**common, "choice": choice, "targets": texts[choice]})

    return dataset.enumerate().flat_map(choices)


def postprocess(text: str, example: Mapping[str, Any], is_target: bool) -> str | metrics.Choice:
    """Turns targets into `metrics.Choice`s, and returns predictions unchanged."""
    if not is_target:
        return text
    return metrics.Choice(
        **{name: int(example[name]) for name in ("question", "choice", "num_choices", "answer")},
        tokens=len(example["targets"]),
        bytes=len(example["targets_pretokenized"]),
    )


register(
    NAME,
    _Ranked(NAME, lambda settings: readers.MultipleChoice(), default_files=_files_needed),
    [one_example_per_choice, preprocessors.tokenize],
    postprocess_fn=postprocess,
    metric_fns=[metrics.rank_choices],
)
