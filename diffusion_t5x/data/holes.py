"""Targets with a hole: the text around it is given, and the hole has room to spare."""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

import gin
from diffusion_t5x.interfaces import FIXED_FEATURE

Features = Mapping[str, tf.Tensor]


@gin.configurable(allowlist=["hole_tokens"])
def tokenize_with_hole(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    sequence_length: Mapping[str, int] | None = None,
    hole_tokens: int = 32,
) -> tf.data.Dataset:
    """Tokenizes examples with the texts 'inputs', 'before', 'hole' and 'after'.

    'targets' are the tokens of the three, those of the hole padded with 0 to `hole_tokens`, so that
    a hole does not tell how long its text is. Its positions alone are not fixed.

    Raises:
      InvalidArgumentError: while reading, if the text of a hole has more tokens.
    """

    def encode(features: Features) -> Features:
        targets = output_features["targets"].vocabulary
        before, hole, after = (
            tf.ensure_shape(targets.encode_tf(features[name]), [None])
            for name in ("before", "hole", "after")
        )
        room = hole_tokens - tf.size(hole)
        message = f"HOLE_TOKENS = {hole_tokens}, but the text of a hole has more"
        with tf.control_dependencies([tf.debugging.assert_non_negative(room, message)]):
            hole = tf.pad(hole, [[0, tf.maximum(room, 0)]])
        tokens = tf.concat([before, hole, after], axis=0)
        length = (sequence_length or {}).get("targets", tf.size(tokens) + 1)  # with the end
        index = tf.range(length)
        inside = (index >= tf.size(before)) & (index < tf.size(before) + hole_tokens)
        return {
            **features,
            "inputs": output_features["inputs"].vocabulary.encode_tf(features["inputs"]),
            "inputs_pretokenized": features["inputs"],
            "targets": tokens,
            "targets_pretokenized": features["before"] + features["hole"] + features["after"],
            FIXED_FEATURE: tf.cast(~inside, tf.int32),
        }

    return dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
