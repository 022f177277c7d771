"""Converters give both architectures one layout, in which padding may count."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_t5x.data.feature_converters import CanvasFeatureConverter, EncDecFeatureConverter

LENGTHS = {"inputs": 5, "targets": 6}
EXAMPLES = [([7, 8, 9], [4, 5, 1]), ([7], [3, 1]), ([6] * 5, [2, 3, 4, 5, 6, 1])]


def _convert(converter):
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"inputs": i, "targets": t} for i, t in EXAMPLES),
        output_signature={name: tf.TensorSpec([None], tf.int32) for name in LENGTHS},
    )
    return list(converter(dataset, LENGTHS).as_numpy_iterator())


def test_every_position_of_a_canvas_counts_padding_included():
    for example in _convert(CanvasFeatureConverter(pack=False)):
        np.testing.assert_array_equal(example["decoder_loss_weights"], np.ones(6))


def test_the_layout_is_padded_targets_and_targets_shifted_right():
    first, second, third = _convert(CanvasFeatureConverter())
    np.testing.assert_array_equal(first["encoder_input_tokens"], [7, 8, 9, 0, 0])
    np.testing.assert_array_equal(first["decoder_target_tokens"], [4, 5, 1, 0, 0, 0])
    np.testing.assert_array_equal(first["decoder_input_tokens"], [0, 4, 5, 1, 0, 0])
    np.testing.assert_array_equal(second["encoder_input_tokens"], [7, 0, 0, 0, 0])
    np.testing.assert_array_equal(second["decoder_target_tokens"], [3, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(third["decoder_target_tokens"], [2, 3, 4, 5, 6, 1])


def test_weights_are_all_that_differs_from_the_encoder_decoder_layout():
    canvases, padded = _convert(CanvasFeatureConverter()), _convert(EncDecFeatureConverter(False))
    for one, other in zip(canvases, padded, strict=True):
        assert set(one) == set(other)
        for name in set(one) - {"decoder_loss_weights"}:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(
            other["decoder_loss_weights"], other["decoder_target_tokens"] > 0
        )


def test_lengths_are_those_of_the_task():
    lengths = CanvasFeatureConverter().get_model_feature_lengths(LENGTHS)
    assert lengths == {
        "encoder_input_tokens": 5,
        "decoder_target_tokens": 6,
        "decoder_input_tokens": 6,
        "decoder_loss_weights": 6,
    }


def test_packing_canvases_is_refused_and_says_what_to_do():
    with pytest.raises(ValueError, match=r"pack = True.*needs pack = False"):
        CanvasFeatureConverter(pack=True)


def test_a_text_longer_than_its_canvas_is_not_cut_in_silence():
    dataset = tf.data.Dataset.from_tensors({"inputs": [3], "targets": [3] * 7})
    converted = CanvasFeatureConverter()(
        dataset.map(lambda example: {k: tf.cast(v, tf.int32) for k, v in example.items()}), LENGTHS
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        list(converted)
