"""SeqIO preprocessors: tokens of no more text than fits, prefix LM and span corruption."""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

from diffusion_t5x.data.vocabularies import sentinel_ids

Features = Mapping[str, tf.Tensor]
# No text has so many characters for each of its tokens.
MOST_CHARACTERS_PER_TOKEN = 64


def tokenize(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """Tokenizes as `seqio.preprocessors.tokenize` does, but no more of a text than can fit.

    What is trimmed later need not be tokenized at each pass, such as a line of megabytes. The
    copies with '_pretokenized' are whole.
    """

    def start(name: str, text: tf.Tensor) -> tf.Tensor:
        length = (sequence_length or {}).get(name)
        if length is None or name not in output_features or text.dtype != tf.string:
            return text
        return tf.strings.substr(text, 0, length * MOST_CHARACTERS_PER_TOKEN, unit="UTF8_CHAR")

    def encode(features: Features) -> Features:
        starts = {name: start(name, value) for name, value in features.items()}
        tokens = seqio.preprocessors.tokenize_impl(starts, output_features, False)
        whole = {
            f"{name}_pretokenized": features[name] for name in features if name in output_features
        }
        return {**whole, **tokens}

    return dataset.map(encode, num_parallel_calls=256)  # as SeqIO's, whose comment says why


def chunk(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
    """Cuts 'targets' `[n]` into consecutive pieces of 2 to `length` tokens."""

    def pieces(features: Features) -> tf.data.Dataset:
        tokens = features["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), length)
        return starts.map(lambda start: {"targets": tokens[start : start + length]})

    return dataset.flat_map(pieces).filter(lambda features: tf.size(features["targets"]) >= 2)


def prefix_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Splits documents into a prefix, 'inputs', and its continuation, 'targets'.

    Documents are `{'targets': tokens [n]}`. Long ones are cut into pieces that fit both lengths,
    with one token of the targets reserved for the end-of-text token. Each piece is split at a
    random position with at least one token on either side.

    Raises:
      ValueError: if the lengths have no room for a token on either side.
    """
    inputs_length, targets_length = sequence_length["inputs"], sequence_length["targets"] - 1
    if min(inputs_length, targets_length) < 1:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS = {sequence_length} has no room for a prefix and its "
            "continuation; expected at least 1 token of inputs and 2 of targets (one ends the "
            "text)."
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
    """Returns the tokens of 'inputs', and of 'targets' with its end, after span corruption."""
    num_noise, num_spans = _noise_sizes(num_tokens, noise_density, mean_span_length)
    return num_tokens - num_noise + num_spans, num_noise + num_spans + 1


def _noise_sizes(size: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Returns how many of `size` tokens are noise, and in how many spans."""
    num_noise = min(max(round(size * noise_density), 1), size - 1)
    num_spans = min(max(round(num_noise / mean_span_length), 1), num_noise, size - num_noise)
    return num_noise, num_spans


def _random_lengths(total: tf.Tensor, count: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws positive integers `[count]` that sum to `total`, each such division equally likely."""
    cuts = tf.random.experimental.stateless_shuffle(tf.range(1, total), seed)[: count - 1]
    edges = tf.concat([[0], tf.sort(cuts), [total]], axis=0)  # [count + 1]
    return edges[1:] - edges[:-1]


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> tf.data.Dataset:
    """Replaces random spans by sentinels, as T5's span corruption (Raffel et al. 2020, 3.1.4).

    Documents are `{'targets': tokens [n]}`, and cut to fit both lengths. 'inputs' has a sentinel of
    the vocabulary of 'targets' in place of each span, see `vocabularies.sentinel_ids`; 'targets'
    has each sentinel and the tokens that it replaced. The end-of-text tokens are not added here.

    Args:
      noise_density: The fraction of tokens in corrupted spans.
      mean_span_length: Tokens per span, on average.

    Raises:
      ValueError: if the lengths have no room for a span, or need more sentinels than there are.
    """

    def fits(size: int) -> bool:
        inputs, targets = span_corruption_lengths(size, noise_density, mean_span_length)
        return inputs <= sequence_length["inputs"] and targets <= sequence_length["targets"]

    sizes = [size for size in range(2, sum(sequence_length.values())) if fits(size)]
    if not sizes:
        raise ValueError(f"TASK_FEATURE_LENGTHS = {sequence_length} has no room for a span.")
    longest = sizes[-1]
    all_sentinels = sentinel_ids(output_features["targets"].vocabulary)
    most_spans = _noise_sizes(longest, noise_density, mean_span_length)[1]
    if most_spans > len(all_sentinels):
        raise ValueError(
            f"extra_ids = {len(all_sentinels)}, but {longest} tokens hold {most_spans} "
            "corrupted spans, each needing a sentinel; raise get_vocabulary.extra_ids, unless the "
            "vocabulary has its own sentinels, or lower the lengths."
        )
    noise_sizes = [_noise_sizes(n, noise_density, mean_span_length) for n in range(longest + 1)]

    @seqio.map_over_dataset(num_seeds=2)
    def corrupt(features: Features, seeds: tf.Tensor) -> Features:
        tokens = features["targets"]
        size = tf.size(tokens)
        noise, spans = tf.unstack(tf.gather(noise_sizes, size))
        lengths = tf.stack(
            [
                _random_lengths(size - noise, spans, seeds[0]),
                _random_lengths(noise, spans, seeds[1]),
            ],
            axis=1,
        )
        # lengths [spans, 2] -> is_noise [size]
        is_noise = tf.repeat(tf.tile([False, True], [spans]), tf.reshape(lengths, [-1]))
        sentinels = tf.constant(all_sentinels, tf.int32)[:spans]
        return {
            "inputs": _replace_spans(tokens, is_noise, sentinels),
            "targets": _replace_spans(tokens, ~is_noise, sentinels),
        }

    return corrupt(chunk(dataset, longest))


def _replace_spans(tokens: tf.Tensor, dropped: tf.Tensor, sentinels: tf.Tensor) -> tf.Tensor:
    """Replaces the i-th span of tokens that are dropped, `[n]` bool, by the i-th sentinel."""
    starts = dropped & ~tf.concat([[False], dropped[:-1]], axis=0)  # [n]
    span = tf.maximum(tf.cumsum(tf.cast(starts, tf.int32)) - 1, 0)  # [n], the index of the span
    replaced = tf.where(starts, tf.gather(sentinels, span), tf.cast(tokens, tf.int32))
    return tf.boolean_mask(replaced, ~dropped | starts)
