"""A SeqIO feature converter for canvases whose padding is learned."""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

EncDecFeatureConverter = seqio.EncDecFeatureConverter


class CanvasFeatureConverter(seqio.EncDecFeatureConverter):
    """A converter that pads targets to the canvas length and counts the padding in the loss.

    Features and lengths are those of `seqio.EncDecFeatureConverter`, except that
    `decoder_loss_weights` is 1 at every position of the canvas, padding included: padding is how a
    model without a length predictor learns where the text ends (arXiv 2401.17181, section 4.1).
    The objective's `padding_weight` then scales the padding.

    Raises:
      ValueError: if `pack` is True: a canvas holds one text, whose end is learned.
    """

    def __init__(self, pack: bool = False, **kwargs):
        if pack:
            raise ValueError(
                "pack = True, but this objective denoises padded canvases and needs pack = False: "
                "it learns the padding after a text."
            )
        super().__init__(pack=False, **kwargs)

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        example = dict(super()._convert_example(features))
        example["decoder_loss_weights"] = tf.ones_like(example["decoder_target_tokens"])
        return example
