"""Infilling of programs, judged by running them: a line, or a span, of the embedded problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from diffusion_t5x.data import holes
from diffusion_t5x.data.embedded import sources

from . import code, metrics
from .features import register

LINE = "embedded_infilling_line"
SPAN = "embedded_infilling_span"

Features = Mapping[str, tf.Tensor]


def _number(text: tf.Tensor, what: str, below: tf.Tensor) -> tf.Tensor:
    """Returns a number in [0, below) that `text` and `what` decide, whatever the process."""
    return tf.strings.to_hash_bucket_fast(what + text, 2**31) % tf.cast(below, tf.int64)


def line_hole(program: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where a line of a function's body begins and ends, in characters.

    Blank lines are never holes, as in the single-line task of HumanEval-infilling (Bavarian et al.,
    arXiv 2207.14255, section 2.2), which has each of the others; here one is chosen.
    """
    lines = tf.strings.split(program, "\n")
    lengths = tf.strings.length(lines, unit="UTF8_CHAR")
    starts = tf.cumsum(lengths + 1, exclusive=True)
    filled = tf.strings.length(tf.strings.strip(lines)) > 0
    body = tf.where(filled & (tf.range(tf.size(lines)) > 0))[:, 0]
    chosen = body[_number(program, "line", tf.size(body))]
    return starts[chosen], starts[chosen] + lengths[chosen]


def span_hole(program: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where a span of a function's body begins and ends: all pairs of places alike.

    This is the random-span task of HumanEval-infilling (Bavarian et al., arXiv 2207.14255).
    """
    head = tf.strings.length(tf.strings.split(program, "\n")[0], unit="UTF8_CHAR") + 1
    size = tf.cast(tf.strings.length(program, unit="UTF8_CHAR") - head, tf.int64)
    one, other = _number(program, "one", size + 1), _number(program, "other", size)
    other += tf.cast(other >= one, tf.int64)  # never the same place
    ends = tf.cast(tf.stack([tf.minimum(one, other), tf.maximum(one, other)]), tf.int32) + head
    return ends[0], ends[1]


def _problem(
    find_hole: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Returns the preprocessor that cuts a hole into each program; the prompt is `code`'s."""

    def cut(example: Features) -> Features:
        program = example["code"]
        start, end = find_hole(program)

        def part(first: tf.Tensor | int, last: tf.Tensor | int) -> tf.Tensor:
            return tf.strings.substr(program, first, last - first, unit="UTF8_CHAR")

        return {
            "before": part(0, start),
            "hole": part(start, end),
            "after": part(end, tf.strings.length(program, unit="UTF8_CHAR")),
            **{name: example[name] for name in ("inputs", "code", "tests")},
        }

    return lambda dataset: code.embedded_problem(dataset).map(cut)


def postprocess(text: str | list[str], example: Mapping[str, Any], is_target: bool) -> Any:
    """Turns targets into their tests and reference code; predictions are whole programs."""
    return code.postprocess(text, example, is_target) if is_target else text


for _name, _find_hole in ((LINE, line_hole), (SPAN, span_hole)):
    register(
        _name,
        sources.EmbeddedDataSource(sources.code_files),
        [code.require_code, _problem(_find_hole), holes.tokenize_with_hole],
        postprocess_fn=postprocess,
        metric_fns=[metrics.CodeMetric((1,))],
    )
