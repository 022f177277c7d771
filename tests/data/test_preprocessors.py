"""Pretraining preprocessors lose nothing, fit their lengths and draw what the papers say."""

import collections

import numpy as np
import pytest
import seqio
import tensorflow as tf

from diffusion_t5x.data import preprocessors

VOCABULARY = seqio.ByteVocabulary(extra_ids=20)  # 279 tokens, the last 20 of them sentinels
LAST = VOCABULARY.vocab_size - 1
FEATURES = {"targets": seqio.Feature(VOCABULARY)}
LENGTHS = {"inputs": 24, "targets": 12}


def _documents(sizes, first=3):
    """Documents in which every token differs from its neighbours, so that order shows."""
    documents = [np.arange(size, dtype=np.int32) % 200 + first for size in sizes]
    return documents, tf.data.Dataset.from_generator(
        lambda: ({"targets": document} for document in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )


def _apply(preprocessor, dataset, *args, seed=0, **kwargs):
    with seqio.map_seed_manager(seed):
        dataset = preprocessor(dataset, *args, **kwargs)
    return list(dataset.as_numpy_iterator())


def _corrupt(sizes, lengths=LENGTHS, seed=0, **kwargs):
    documents, dataset = _documents(sizes)
    return documents, _apply(
        preprocessors.span_corruption, dataset, lengths, FEATURES, seed=seed, **kwargs
    )


def _restore(example):
    """The document: each sentinel of 'inputs' replaced by what follows it in 'targets'."""
    spans = collections.defaultdict(list)
    for token in example["targets"]:
        if token > LAST - VOCABULARY.extra_ids:
            sentinel = token
        else:
            spans[sentinel].append(token)
    return [token for place in example["inputs"] for token in spans.get(place, [place])]


def _sentinels(tokens):
    return [int(token) for token in tokens if token > LAST - VOCABULARY.extra_ids]


def test_chunks_are_consecutive_and_only_a_lone_last_token_is_dropped():
    _, dataset = _documents([7, 4, 1, 9, 0])
    pieces = _apply(preprocessors.chunk, dataset, 4)
    assert [piece["targets"].tolist() for piece in pieces] == [
        [3, 4, 5, 6],
        [7, 8, 9],
        [3, 4, 5, 6],
        [3, 4, 5, 6],
        [7, 8, 9, 10],  # its document's ninth token is alone
    ]


def test_prefix_and_target_are_the_document_and_fit_their_lengths():
    documents, dataset = _documents([2, 3, 10, 35, 36, 100])
    examples = _apply(preprocessors.prefix_lm, dataset, LENGTHS)
    together = np.concatenate([np.concatenate([e["inputs"], e["targets"]]) for e in examples])
    # 35 tokens a piece: the end-of-text token takes one of the 36. The 36th token of the
    # fifth document is alone and dropped.
    documents[4] = documents[4][:35]
    np.testing.assert_array_equal(together, np.concatenate(documents))
    for example in examples:
        assert 1 <= len(example["inputs"]) <= LENGTHS["inputs"]
        assert 1 <= len(example["targets"]) <= LENGTHS["targets"] - 1


def test_the_split_is_uniform_over_all_places_that_fit():
    _, dataset = _documents([15] * 2000)
    examples = _apply(preprocessors.prefix_lm, dataset, {"inputs": 8, "targets": 11})
    counts = collections.Counter(len(example["inputs"]) for example in examples)
    assert set(counts) == {5, 6, 7, 8}  # 15 - 10 tokens at least, 8 at most
    assert all(count == pytest.approx(500, abs=100) for count in counts.values())


@pytest.mark.parametrize("preprocessor", ["prefix_lm", "span_corruption"])
def test_the_seed_alone_decides(preprocessor):
    def draw(seed):
        _, dataset = _documents([40] * 20)
        lengths = {"inputs": 40, "targets": 40}
        args = [lengths] if preprocessor == "prefix_lm" else [lengths, FEATURES]
        examples = _apply(getattr(preprocessors, preprocessor), dataset, *args, seed=seed)
        return [example["inputs"].tolist() for example in examples]

    one = draw(1)
    assert one == draw(1)
    assert one != draw(2)
    assert len(set(map(tuple, one))) > 10  # examples do not share their draws


@pytest.mark.parametrize("lengths", [(0, 8), (8, 1), (8, 0)])
def test_prefix_lm_refuses_lengths_without_room(lengths):
    lengths = dict(zip(("inputs", "targets"), lengths, strict=True))
    _, dataset = _documents([5])
    with pytest.raises(ValueError, match=r"TASK_FEATURE_LENGTHS = .* has no room"):
        _apply(preprocessors.prefix_lm, dataset, lengths)


def test_prefix_lm_of_the_smallest_lengths():
    documents, dataset = _documents([6])
    examples = _apply(preprocessors.prefix_lm, dataset, {"inputs": 1, "targets": 2})
    pairs = [[*example["inputs"], *example["targets"]] for example in examples]
    np.testing.assert_array_equal(pairs, documents[0].reshape(3, 2))


def test_corrupted_inputs_and_targets_restore_the_document():
    sizes = [*range(2, 27), 27, 100]
    documents, examples = _corrupt(sizes)
    restored = np.concatenate([_restore(example) for example in examples])
    np.testing.assert_array_equal(restored, np.concatenate(documents))
    assert len(examples) > len(documents)  # the long one is in several pieces


def test_sentinels_count_down_from_the_last_token_on_both_sides():
    _, examples = _corrupt(range(2, 27), noise_density=0.4, mean_span_length=2.0)
    for example in examples:
        expected = [LAST - index for index in range(len(_sentinels(example["targets"])))]
        assert expected
        assert _sentinels(example["inputs"]) == _sentinels(example["targets"]) == expected
        # As in T5, a text begins with tokens that stay and ends with ones that do not.
        assert example["inputs"][0] < LAST - VOCABULARY.extra_ids
        assert example["targets"][0] == LAST
        assert example["inputs"][-1] == expected[-1]


def test_corruption_with_no_choice_left():
    # Of two tokens exactly the second is noise; a single span of half the tokens of four has
    # only one place: the end.
    _, examples = _corrupt([2, 4], noise_density=0.5, mean_span_length=2.0)
    assert [(e["inputs"].tolist(), e["targets"].tolist()) for e in examples] == [
        ([3, LAST], [LAST, 4]),
        ([3, 4, LAST], [LAST, 5, 6]),
    ]


@pytest.mark.parametrize(
    "size,density,mean,noise,spans",
    [
        # round(size * density) tokens in round(noise / mean) spans, each at least one.
        (512, 0.15, 3.0, 77, 26),
        (568, 0.15, 3.0, 85, 28),
        (114, 0.15, 3.0, 17, 6),
        (2, 0.15, 3.0, 1, 1),
        (10, 0.15, 3.0, 2, 1),  # half goes to even
        (30, 0.15, 3.0, 4, 1),
        (100, 0.5, 1.0, 50, 50),
        (10, 0.9, 1.0, 9, 1),  # every span needs a token before it
    ],
)
def test_noise_sizes_are_t5s(size, density, mean, noise, spans):
    inputs, targets = preprocessors.span_corruption_lengths(size, density, mean)
    assert (inputs, targets) == (size - noise + spans, noise + spans + 1)


@pytest.mark.parametrize("density,mean", [(0.15, 3.0), (0.5, 1.0), (0.3, 10.0)])
def test_sizes_are_the_promised_ones_and_fit(density, mean):
    sizes = range(2, 17)
    documents, examples = _corrupt(sizes, noise_density=density, mean_span_length=mean)
    assert len(examples) >= len(documents)
    for example in examples:
        size = len(_restore(example))
        got = len(example["inputs"]), len(example["targets"]) + 1  # end-of-text comes later
        assert got == preprocessors.span_corruption_lengths(size, density, mean)
        assert got[0] <= LENGTHS["inputs"]
        assert got[1] <= LENGTHS["targets"]


def test_pieces_are_as_long_as_the_lengths_allow():
    # T5's own numbers: inputs of 512 and targets of 114 tokens hold pieces of 568.
    assert preprocessors.span_corruption_lengths(568, 0.15, 3.0) == (511, 114)
    assert preprocessors.span_corruption_lengths(569, 0.15, 3.0) == (512, 114)
    _, examples = _corrupt([200], lengths={"inputs": 24, "targets": 9})
    size = len(_restore(examples[0]))
    larger = preprocessors.span_corruption_lengths(size + 1, 0.15, 3.0)
    assert larger[0] > 24 or larger[1] > 9


def test_every_division_into_spans_is_equally_likely():
    # Six tokens, two noise tokens in two spans: the four others divide as 1+3, 2+2 or 3+1.
    _, examples = _corrupt([6] * 1500, noise_density=1 / 3, mean_span_length=1.0)
    firsts = collections.Counter(int(example["targets"][1]) for example in examples)
    assert set(firsts) == {4, 5, 6}
    assert all(count == pytest.approx(500, abs=100) for count in firsts.values())


def test_span_corruption_refuses_lengths_without_room():
    with pytest.raises(ValueError, match=r"TASK_FEATURE_LENGTHS = .* has no room for a span"):
        _corrupt([5], lengths={"inputs": 8, "targets": 2})


def test_too_few_sentinels_are_refused_with_the_number_needed():
    lengths = {"inputs": 100, "targets": 100}
    with pytest.raises(ValueError, match=r"extra_ids = 20, but 100 tokens hold 49 corrupted"):
        _corrupt([5], lengths=lengths, noise_density=0.49, mean_span_length=1.0)
    _, examples = _corrupt([5], lengths={"inputs": 100, "targets": 42}, noise_density=0.15)
    assert len(examples) == 1
