"""Feature converters: what SeqIO's own lack for canvases whose padding is learned."""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

EncDecFeatureConverter = seqio.EncDecFeatureConverter


class CanvasFeatureConverter(seqio.EncDecFeatureConverter):
    """Pads every target to the canvas length and counts the padding in the loss.

    Same features and lengths as `seqio.EncDecFeatureConverter`, except that
    `decoder_loss_weights` is 1 at every position of the canvas, padding included, because
    padding is how a model without a length predictor learns where the text ends (arXiv
    2401.17181, section 3). How much padding counts is then the objective's `padding_weight`.

    Raises:
      ValueError: if packing is asked for: a canvas holds one text, whose end is learned.
    """

    def __init__(self, pack: bool = False, **kwargs):
        if pack:
            raise ValueError(
                "pack = True, but this objective denoises padded canvases and needs pack = False: "
                "the padding after a text is part of what is learned."
            )
        super().__init__(pack=False, **kwargs)

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        example = dict(super()._convert_example(features))
        example["decoder_loss_weights"] = tf.ones_like(example["decoder_target_tokens"])
        return example
