"""A text ends at its first end-of-text or padding token, whatever stands behind."""

import numpy as np
import pytest
import seqio

from diffusion_t5x.data.detokenize import detokenize, end_text

BYTES = seqio.ByteVocabulary()


@pytest.mark.parametrize(
    "tokens,expected",
    [
        ([5, 6, 1, 0, 0], [5, 6, 1, 1, 1]),
        ([5, 6, 1, 7, 8], [5, 6, 1, 1, 1]),
        ([5, 0, 7, 1, 8], [5, 1, 1, 1, 1]),
        ([1, 5, 6, 7, 8], [1, 1, 1, 1, 1]),
        ([0, 5, 6, 7, 8], [1, 1, 1, 1, 1]),
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9]),
    ],
)
def test_everything_from_the_first_end_or_padding_on_is_end(tokens, expected):
    np.testing.assert_array_equal(end_text(np.array(tokens), eos_id=1), expected)


def test_without_an_end_token_padding_ends_a_text():
    np.testing.assert_array_equal(end_text(np.array([5, 1, 0, 6]), eos_id=None), [5, 1, 0, 0])


def test_rows_end_each_at_its_own_place_and_ending_twice_changes_nothing():
    tokens = np.random.default_rng(0).integers(0, 5, (3, 4, 9))
    ended = end_text(tokens, eos_id=1)
    assert ended.shape == tokens.shape
    for row, out in zip(tokens.reshape(-1, 9), ended.reshape(-1, 9), strict=True):
        np.testing.assert_array_equal(out, end_text(row, eos_id=1))
    np.testing.assert_array_equal(end_text(ended, eos_id=1), ended)


@pytest.mark.parametrize("text", ["", "abc", "déjà vu\n\t", "日本語", " two  spaces "])
def test_text_survives_tokens_end_padding_and_stray_tokens(text):
    tokens = BYTES.encode(text)
    assert detokenize(np.array([*tokens, 1, 0, 0]), BYTES) == text
    assert detokenize(np.array([*tokens, 1, 99, 98]), BYTES) == text
    assert detokenize(np.array([*tokens, 0, 99, 1]), BYTES) == text
    assert detokenize(np.array(tokens, np.int32), BYTES) == text


def test_a_vocabulary_without_end_ends_at_padding():
    vocabulary = seqio.PassThroughVocabulary(100)
    assert vocabulary.eos_id is None
    assert list(detokenize(np.array([5, 1, 0, 6]), vocabulary)) == [5, 1]
