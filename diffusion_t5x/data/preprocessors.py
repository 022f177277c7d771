"""SeqIO preprocessors for pretraining: prefix LM and span corruption of documents."""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

from diffusion_t5x.data.vocabularies import sentinel_ids

Features = Mapping[str, tf.Tensor]


def chunk(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
    """Cuts 'targets' `[n]` into consecutive pieces of at most `length` tokens, none under 2."""

    def pieces(features: Features) -> tf.data.Dataset:
        tokens = features["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(pieces).filter(lambda features: tf.size(features["targets"]) >= 2)


def prefix_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Splits documents in two: 'inputs' is the prefix, 'targets' what follows it.

    Long documents are cut to pieces of at most inputs + targets tokens (one of the targets' is
    left for the end-of-text token); each is split at a random position that leaves at least one
    token on either side and fits both lengths.

    Args:
      dataset: of `{'targets': tokens [n]}`.
      sequence_length: maximum tokens of 'inputs' and 'targets'.

    Raises:
      ValueError: if the lengths leave no room for a token on either side.
    """
    inputs_length, targets_length = sequence_length["inputs"], sequence_length["targets"] - 1
    if min(inputs_length, targets_length) < 1:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS = {sequence_length} has no room for a prefix and what follows "
            "it; expected at least 1 token of inputs and 2 of targets (one ends the text)."
        )

    @seqio.map_over_dataset(num_seeds=1)
    def split(features: Features, seed: tf.Tensor) -> Features:
        tokens = features["targets"]
        size = tf.size(tokens)
        first = tf.maximum(1, size - targets_length)
        last = tf.minimum(inputs_length, size - 1)
        at = tf.random.stateless_uniform([], seed, minval=first, maxval=last + 1, dtype=tf.int32)
        return {"inputs": tokens[:at], "targets": tokens[at:]}

    return split(chunk(dataset, inputs_length + targets_length))


def span_corruption_lengths(
    num_tokens: int, noise_density: float, mean_span_length: float
) -> tuple[int, int]:
    """Tokens of 'inputs' and 'targets' (end-of-text included) that `num_tokens` turn into."""
    num_noise, num_spans = _noise_sizes(num_tokens, noise_density, mean_span_length)
    return num_tokens - num_noise + num_spans, num_noise + num_spans + 1


def _noise_sizes(size: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    num_noise = min(max(round(size * noise_density), 1), size - 1)
    num_spans = min(max(round(num_noise / mean_span_length), 1), num_noise, size - num_noise)
    return num_noise, num_spans


def _random_lengths(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """`[parts]` positive integers that sum to `total`, each such division equally likely."""
    cuts = tf.random.experimental.stateless_shuffle(tf.range(1, total), seed)[: parts - 1]
    edges = tf.concat([[0], tf.sort(cuts), [total]], axis=0)
    return edges[1:] - edges[:-1]


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> tf.data.Dataset:
    """T5's span corruption (Raffel et al. 2020, section 3.1.4), without end-of-text tokens.

    Random spans are replaced in 'inputs' by the vocabulary's sentinels, see
    `vocabularies.sentinel_ids`; 'targets' repeats each followed by the tokens that it stands for.

    Args:
      dataset: of `{'targets': tokens [n]}`.
      sequence_length: maximum tokens of 'inputs' and 'targets'; documents are cut so as to fit.
      output_features: whose vocabulary has the sentinels.
      noise_density: fraction of tokens in spans.
      mean_span_length: tokens per span, on average.

    Raises:
      ValueError: if the lengths leave no room, or need more sentinels than there are.
    """
    all_sentinels = sentinel_ids(output_features["targets"].vocabulary)
    fits = [
        size
        for size in range(2, sum(sequence_length.values()))
        if all(
            needed <= sequence_length[name]
            for name, needed in zip(
                ("inputs", "targets"),
                span_corruption_lengths(size, noise_density, mean_span_length),
                strict=True,
            )
        )
    ]
    if not fits:
        raise ValueError(f"TASK_FEATURE_LENGTHS = {sequence_length} has no room for a span.")
    most_spans = _noise_sizes(fits[-1], noise_density, mean_span_length)[1]
    if most_spans > len(all_sentinels):
        raise ValueError(
            f"extra_ids = {len(all_sentinels)}, but {fits[-1]} tokens hold {most_spans} "
            "corrupted spans, each needing a sentinel; raise get_vocabulary.extra_ids, unless the "
            "vocabulary has its own sentinels, or lower the lengths."
        )

    @seqio.map_over_dataset(num_seeds=2)
    def corrupt(features: Features, seeds: tf.Tensor) -> Features:
        tokens = features["targets"]
        size = tf.size(tokens)
        noise = tf.cast(tf.round(tf.cast(size, tf.float64) * noise_density), tf.int32)
        noise = tf.minimum(tf.maximum(noise, 1), size - 1)
        spans = tf.cast(tf.round(tf.cast(noise, tf.float64) / mean_span_length), tf.int32)
        spans = tf.minimum(tf.minimum(tf.maximum(spans, 1), noise), size - noise)
        lengths = tf.stack(
            [
                _random_lengths(size - noise, spans, seeds[0]),
                _random_lengths(noise, spans, seeds[1]),
            ],
            axis=1,
        )
        is_noise = tf.repeat(tf.tile([False, True], [spans]), tf.reshape(lengths, [-1]))
        sentinels = tf.constant(all_sentinels, tf.int32)[:spans]
        return {
            "inputs": _replace_spans(tokens, is_noise, sentinels),
            "targets": _replace_spans(tokens, ~is_noise, sentinels),
        }

    return corrupt(chunk(dataset, fits[-1]))


def _replace_spans(tokens: tf.Tensor, dropped: tf.Tensor, sentinels: tf.Tensor) -> tf.Tensor:
    """Drops tokens; the i-th sentinel stands for the i-th span of dropped ones.

    Args:
      tokens: `[n]`.
      dropped: `[n]` bool.
      sentinels: one per span.
    """
    starts = dropped & ~tf.concat([[False], dropped[:-1]], axis=0)
    span = tf.maximum(tf.cumsum(tf.cast(starts, tf.int32)) - 1, 0)
    replaced = tf.where(starts, tf.gather(sentinels, span), tf.cast(tokens, tf.int32))
    return tf.boolean_mask(replaced, ~dropped | starts)
