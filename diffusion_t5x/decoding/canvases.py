"""The record of canvases between denoising steps: its start, its window, its end."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.lengths import bucket_lengths
from diffusion_t5x.interfaces import Canvas, Fixed, Readout

Array = jax.Array
Tree = TypeVar("Tree")


def start(
    noise: Array, num_steps: int, keep_trajectory: bool, conditioning: Array | None = None
) -> Canvas:
    """Returns the canvases before the first step, from `noise [rows, length]` int32."""
    count, length = noise.shape
    unknown = jnp.full((count, length), -jnp.inf)
    nothing = jnp.full((count, length), -1, jnp.int32)
    trajectory = None
    if keep_trajectory:
        trajectory = jnp.zeros((count, num_steps + 1, length), jnp.int32).at[:, 0].set(noise)
    return Canvas(
        tokens=noise,
        text=noise,
        certainty=unknown,
        score=jnp.full(count, -jnp.inf),
        readout=Readout(nothing, nothing, unknown, unknown, unknown, unknown),
        done=jnp.zeros(count, bool),
        used=jnp.full(count, length, jnp.int32),
        trajectory=trajectory,
        conditioning=conditioning,
    )


def impose(canvas: Canvas, fixed: Fixed | None) -> Canvas:
    """Returns canvases with the fixed tokens, which are certain; `fixed` is `[rows, length]`."""
    if fixed is None:
        return canvas
    return canvas._replace(
        tokens=jnp.where(fixed.where, fixed.tokens, canvas.tokens),
        text=jnp.where(fixed.where, fixed.tokens, canvas.text),
        certainty=jnp.where(fixed.where, 0.0, canvas.certainty),
    )


def impose_on_readout(readout: Readout, fixed: Fixed | None) -> Readout:
    """Returns a readout that gives the fixed tokens probability 1: `fixed` is `[rows, length]`.

    Rules therefore take them for what they have written already, and scores do not count them.
    """
    if fixed is None:
        return readout
    known: dict[str, Array | float] = {"drawn": fixed.tokens, "argmax": fixed.tokens, "margin": 1.0}
    given: dict[str, Array] = {
        name: jnp.where(fixed.where, known.get(name, 0.0), value)
        for name, value in readout._asdict().items()
        if value is not None
    }
    return readout._replace(**given)


def windows(canvas: Canvas, trim_multiple: int) -> tuple[list[int], Array]:
    """Returns the lengths that a step may read, and the index of the one that it needs.

    They are the `bucket_lengths` of `trim_multiple`, or with 0 the whole length alone; needed is
    the first that holds every position in use, a scalar int32.
    """
    length = canvas.tokens.shape[1]
    if not 0 < trim_multiple < length:
        return [length], jnp.int32(0)
    lengths = bucket_lengths(length, trim_multiple)
    longest = jnp.max(jnp.where(canvas.done, 1, canvas.used))
    return lengths, jnp.searchsorted(jnp.array(lengths), longest)


def count_used(canvas: Canvas, argmax: Array) -> Array:
    """Counts positions before the padding that ends both a canvas and its argmax: `[rows]`."""
    is_text = (canvas.tokens != 0) | (argmax != 0)
    end = jnp.max(jnp.where(is_text, jnp.arange(1, is_text.shape[1] + 1), 1), axis=1)
    return jnp.minimum(canvas.used, end.astype(jnp.int32))


def last_given(fixed: Fixed) -> Array:
    """Returns the place of the last fixed token that is not padding, before which no text ends.

    It is 0 where there is none; `[batch]` int32.
    """
    given = fixed.where & (fixed.tokens != 0)
    return jnp.max(jnp.where(given, jnp.arange(given.shape[1]), 0), axis=1)


def ended(tokens: Array, eos_id: int, fixed: Fixed | None = None) -> Array:
    """Marks what comes after the end of `tokens [rows, length]`, their first `eos_id`: bool.

    Before the last fixed token there is no end; `fixed` is `[rows, length]`.
    """
    is_end = tokens == eos_id
    if fixed is not None:
        is_end &= jnp.arange(tokens.shape[1]) >= last_given(fixed)[:, None]
    ends = is_end.astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) > ends


def keep_text(
    canvas: Canvas,
    readout: Readout,
    eos_id: int,
    fixed: Fixed | None = None,
    text: Array | None = None,
) -> tuple[Canvas, Readout]:
    """Leaves out what comes after texts, as if a network that is certain had padding there.

    The canvas, its last argmax, and what was read and drawn from it each end with their own first
    `eos_id` (see `ended`). But if a rule keeps what it has written, its own `text [rows, length]`
    says which log-probabilities count: what is drawn where the canvas has text means nothing.
    """

    def end(tokens: Array, values: Array) -> Array:
        return jnp.where(ended(tokens, eos_id, fixed), 0, values)

    def count(tokens: Array, values: Array) -> Array:
        return end(tokens if text is None else text, values)

    before = canvas.readout.argmax
    cut = Readout(
        drawn=end(readout.drawn, readout.drawn),
        argmax=end(readout.argmax, readout.argmax),
        drawn_log_prob=count(readout.drawn, readout.drawn_log_prob),
        argmax_log_prob=count(readout.argmax, readout.argmax_log_prob),
        canvas_log_prob=count(canvas.tokens, readout.canvas_log_prob),
        entropy=end(readout.argmax, readout.entropy),
        margin=readout.margin,
    )
    last = canvas.readout._replace(argmax=end(before, before))
    tokens = end(canvas.tokens, canvas.tokens)
    certainty = canvas.certainty if text is None else count(text, canvas.certainty)
    return canvas._replace(tokens=tokens, certainty=certainty, readout=last), cut


def pad_ended(canvas: Canvas, eos_id: int, fixed: Fixed | None) -> Canvas:
    """Writes padding after the end of texts, and on canvases after an end that stands there.

    That padding is certain. An end that a text has and its canvas has not may yet be taken back.
    """
    written = jnp.where(canvas.tokens == canvas.text, canvas.text, 0)
    after = ended(written, eos_id, fixed)
    return canvas._replace(
        tokens=jnp.where(after, 0, canvas.tokens),
        text=jnp.where(ended(canvas.text, eos_id, fixed), 0, canvas.text),
        certainty=jnp.where(after, 0.0, canvas.certainty),
    )


def keep_done(new: Canvas, old: Canvas) -> Canvas:
    """Returns `new`, but `old` where a canvas was already done."""

    def choose(n: Array, o: Array) -> Array:
        return jnp.where(old.done.reshape(-1, *[1] * (n.ndim - 1)), o, n)

    return jax.tree.map(choose, new, old)


def record(canvas: Canvas, step: Array) -> Canvas:
    """Writes the canvas after step `step` into the trajectory, if there is one."""
    if canvas.trajectory is None:
        return canvas
    return canvas._replace(trajectory=canvas.trajectory.at[:, step + 1].set(canvas.tokens))


def fill_trajectory(canvas: Canvas, step: Array) -> Canvas:
    """Writes the text as the canvas after step `step` and all later ones."""
    if canvas.trajectory is None:
        return canvas
    later = jnp.arange(canvas.trajectory.shape[1])[:, None] >= step  # [steps, 1]
    trajectory = jnp.where(later, canvas.text[:, None], canvas.trajectory)
    return canvas._replace(trajectory=trajectory)


def drop_uncertain(canvas: Canvas, count: int) -> tuple[Canvas, Canvas]:
    """Splits off the `count` canvases per example that the network is least certain of.

    Every field is `[batch, samples, ...]`; the dropped canvases are returned first.
    """
    canvas = best_last(jnp.sum(canvas.readout.argmax_log_prob, axis=-1), canvas)
    dropped = jax.tree.map(lambda x: x[:, :count], canvas)
    return dropped, jax.tree.map(lambda x: x[:, count:], canvas)


def best_last(scores: Array, tree: Tree) -> Tree:
    """Sorts a tree of `[batch, samples, ...]` by `scores [batch, samples]`, the best last."""
    order = jnp.argsort(scores, axis=1)

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, tree)
