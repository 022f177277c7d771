"""SeqIO feature converters: for canvases whose padding is learned, and for texts in packed rows."""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

from diffusion_t5x.interfaces import FIXED_FEATURE


class EncDecFeatureConverter(seqio.EncDecFeatureConverter):
    """SeqIO's converter, which also passes on which positions of a task's targets are fixed.

    The task's feature `decoder_fixed_positions` (int32, 1 where a position is fixed, for as many
    positions as targets may have) is passed through, where a data set has it.

    Raises:
      ValueError: if examples with fixed positions are to be packed.
    """

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        if FIXED_FEATURE not in ds.element_spec or FIXED_FEATURE in self._passthrough_features:
            return super().__call__(ds, task_feature_lengths)
        if self.pack:
            raise ValueError(
                f"PACK = True, but the examples have fixed positions ({FIXED_FEATURE}), which "
                "packed rows cannot keep; set PACK = False."
            )
        converter = type(self)(
            pack=False,
            apply_length_check=self._apply_length_check,
            bos_id=self.bos_id,
            passthrough_features={FIXED_FEATURE: self.FeatureSpec(dtype=tf.int32)},
        )
        return converter(
            ds, {**task_feature_lengths, FIXED_FEATURE: task_feature_lengths["targets"]}
        )


class CanvasFeatureConverter(EncDecFeatureConverter):
    """A converter that pads targets to the canvas length and counts the padding in the loss.

    Features and lengths are those of `EncDecFeatureConverter`, except that
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
