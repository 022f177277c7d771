"""One compiled training step: gradients, accumulation, clipping, update and a health report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import partitioning as nn_partitioning

from diffusion_t5x.interfaces import Model
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import TrainState, named_leaves, replace, select
from diffusion_t5x.training.optimizers import Schedule

Metrics = dict[str, clu.metrics.Average]
Batch = Mapping[str, jax.Array]


class NonFiniteError(FloatingPointError):
    """The loss, a gradient or an update is not finite; the message names the step and leaves."""


class Health(flax.struct.PyTreeNode):
    """The quantities of a step that show whether it went wrong.

    Attributes:
      step: The step that the update led to, int32.
      loss: The loss of the batch.
      grad_squares: `[leaves]`, the squared norm of each gradient leaf, in the order of
        `named_leaves`; frozen parameters have none.
      update_squares: `[leaves]`, the squared norm of each leaf that was added to the parameters.
    """

    step: jax.Array
    loss: jax.Array
    grad_squares: jax.Array
    update_squares: jax.Array


def merge_metrics(ours: Metrics, theirs: Metrics) -> Metrics:
    """Adds up two sets of metrics of the same names."""
    return {name: ours[name].merge(theirs[name]) for name in theirs}


def _split_batch(batch: Batch, count: int) -> Batch:
    """Splits `[batch, ...]` into microbatches `[count, batch / count, ...]`.

    Every microbatch is spread over all data-parallel shards.
    """

    def split(x: jax.Array) -> jax.Array:
        # Neighbouring rows go to different microbatches: [count, batch / count, ...].
        x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        axes = (None, "batch", *[None] * (x.ndim - 2))
        return nn_partitioning.with_sharding_constraint(x, axes)

    return jax.tree.map(split, dict(batch))


def _leaf_squares(tree: Any) -> jax.Array:
    """Returns the squared norms of the leaves: `[leaves]`."""
    return jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in named_leaves(tree).values()])


def _unless_finite(
    health: Health, old: TrainState, new: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """Returns the new state and metrics if the step is finite, else the old state and no metrics.

    The step number advances in either case, so that each step has the same batch, key and learning
    rate whatever was skipped before it.
    """
    squares = jnp.stack([health.grad_squares, health.update_squares])  # [2, leaves]
    finite = jnp.isfinite(health.loss) & jnp.all(jnp.isfinite(squares))

    def choose(one: Any, other: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(finite, x, y), one, other)

    nothing = jax.tree.map(jnp.zeros_like, metrics)
    return choose(new, old).replace(step=new.step), choose(metrics, nothing)


class Trainer:
    """Compiled train and eval steps of one model.

    Attributes:
      abstract_state: Shapes and shardings of the train state, its average included.
      leaf_names: Names of the trained parameters, in the order of `Health.grad_squares`.
      step: `(state, metrics, batch) -> (state, metrics, health)`, compiled; donates state, metrics.
      eval_step: `(params, metrics, batch) -> metrics`, compiled; donates metrics.
    """

    def __init__(
        self,
        model: Model,
        partitioner: PjitPartitioner,
        abstract_state: TrainState,
        random_seed: int,
        learning_rate_fn: Schedule,
        num_microbatches: int | None = None,
        clip_norm: float | None = None,
        max_skipped_updates: int = 0,
        first_step: int = 0,
        ema_decay: float | None = None,
    ):
        """Prepares the steps; they are compiled when they are first called or lowered.

        Args:
          abstract_state: Shapes and shardings of the train state, without an average.
          random_seed: Seed of all randomness in training. The key of a step is this seed's key
            folded with the step.
          learning_rate_fn: Learning rate schedule, `step -> rate`.
          num_microbatches: Number of microbatches whose gradients are accumulated; None for 1.
          clip_norm: Largest global norm of the gradient; None for no clipping.
          max_skipped_updates: Number of updates in a row that are skipped because a loss, gradient
            or update is not finite; the next one stops training. 0 stops at the first.
          first_step: The step that the run started at, from which the model's loss counts.
          ema_decay: Decay of the moving average of the parameters that is evaluated; None for no
            average. At step `i` of the run, from 0, it is min(ema_decay, (1 + i) / (10 + i)), as in
            TensorFlow's `ExponentialMovingAverage`, so that the first parameters are soon
            forgotten. Skipped updates leave the average as it is.

        Raises:
          ValueError: If a number is out of range.
        """
        if num_microbatches is not None and num_microbatches < 1:
            raise ValueError(f"num_microbatches = {num_microbatches}; expected at least 1 or None.")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm = {clip_norm}; expected a positive number or None.")
        if max_skipped_updates < 0:
            raise ValueError(f"max_skipped_updates = {max_skipped_updates}; expected at least 0.")
        if ema_decay is not None and not 0.0 < ema_decay < 1.0:
            raise ValueError(
                f"EMA_DECAY = {ema_decay}; expected 0 < EMA_DECAY < 1, such as 0.9999, or None for "
                "no moving average."
            )
        self.model = model
        self.partitioner = partitioner
        self._ema_decay = ema_decay
        if ema_decay is not None:
            average = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
                select(abstract_state.params, model.is_trained),
            )
            abstract_state = abstract_state.replace(average=average)
        self.abstract_state = abstract_state
        self._learning_rate_fn = learning_rate_fn
        self.num_microbatches = num_microbatches or 1
        self._clip_norm = clip_norm
        self._rng = jax.random.PRNGKey(random_seed)
        self._first_step = first_step
        self.max_skipped_updates = max_skipped_updates
        self.leaf_names = list(named_leaves(select(abstract_state.params, model.is_trained)))
        # Functions of their own for JAX, so that shapes of metrics and steps share one trace.
        self._traced_update = jax.jit(self._update, inline=True)
        self._traced_eval = jax.jit(model.eval_fn, inline=True)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
        everywhere = partitioner.replicated
        self.step = partitioner.jit(
            self._step, donate_argnums=(0, 1), out_shardings=(shardings, everywhere, everywhere)
        )
        self.eval_step = partitioner.jit(
            lambda params, metrics, batch: merge_metrics(
                metrics, self._traced_eval(params, batch)[1]
            ),
            donate_argnums=(1,),
            out_shardings=everywhere,
        )

    def check_batch_size(self, batch_size: int) -> None:
        """Refuses a `batch_size` whose microbatches data-parallel shards do not divide evenly."""
        [rows] = self.partitioner.batch_sharding.shard_shape((batch_size,))
        if rows % self.num_microbatches:
            raise ValueError(
                f"Trainer.num_microbatches = {self.num_microbatches} does not divide the {rows} "
                f"examples that a data-parallel shard has of BATCH_SIZE = {batch_size}; expected "
                f"one of {[n for n in range(1, rows + 1) if rows % n == 0]}."
            )

    def begin_average(self, state: TrainState) -> TrainState:
        """Returns the state with the average that a run keeps, the parameters if it has none."""
        if self._ema_decay is None or state.average is not None:
            return state
        trained = select(state.params, self.model.is_trained)
        # Arrays of their own, which steps may donate.
        copy = self.partitioner.jit(
            lambda params: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params),
            out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_state.average),
        )
        return state.replace(average=copy(trained))

    def metric_shapes(self, state: TrainState, batch: Batch) -> Metrics:
        """Returns the shapes of the metrics that a training step accumulates."""
        return self.partitioner.jit(self._traced_update).eval_shape(state, batch)[1]

    def eval_metric_shapes(self, state: TrainState, batch: Batch) -> Metrics:
        """Returns the shapes of the metrics that an eval step accumulates."""
        return self.partitioner.jit(self._traced_eval).eval_shape(state.params, batch)[1]

    def empty_metrics(self, shapes: Metrics) -> Metrics:
        """Returns metrics over no steps, on every device, from metrics or their shapes."""
        return jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), self.partitioner.replicated),
            shapes,
        )

    def _step(
        self, state: TrainState, metrics: Metrics, batch: Batch
    ) -> tuple[TrainState, Metrics, Health]:
        state, new, health = self._traced_update(state, batch)
        return state, merge_metrics(metrics, new), health

    def _update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, Health]:
        """Computes gradients, clips them, and applies the optimiser's update."""
        loss, metrics, grads = self._gradients(state, batch)
        squares = _leaf_squares(grads)
        norm = jnp.sqrt(jnp.sum(squares))
        if self._clip_norm is not None:
            scale = jnp.minimum(1.0, self._clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        rate = jnp.asarray(self._learning_rate_fn(state.step), jnp.float32)
        trained = select(state.params, self.model.is_trained)
        updates, opt_state = self.model.optimizer_def.update(grads, state.opt_state, trained)
        updates = jax.tree.map(lambda u: u * rate, updates)
        trained = optax.apply_updates(trained, updates)
        params = replace(state.params, trained)
        one = jnp.float32(1.0)
        metrics = {
            **metrics,
            "learning_rate": clu.metrics.Average(total=rate, count=one),
            "grad_norm": clu.metrics.Average(total=norm, count=one),
        }
        new = TrainState(state.step + 1, params, opt_state, self._averaged(state, trained))
        health = Health(new.step, loss, squares, _leaf_squares(updates))
        if self.max_skipped_updates:
            new, metrics = _unless_finite(health, state, new, metrics)
        return new, metrics, health

    def _averaged(self, state: TrainState, trained: Any) -> Any:
        """Returns the average after an update of `state` to the parameters `trained`."""
        if self._ema_decay is None:
            return None
        number = (state.step - self._first_step).astype(jnp.float32)
        decay = jnp.minimum(self._ema_decay, (1.0 + number) / (10.0 + number))
        trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        return optax.incremental_update(trained, state.average, 1.0 - decay)

    def _gradients(self, state: TrainState, batch: Batch) -> tuple[jax.Array, Metrics, Any]:
        """Returns loss, metrics and gradients of a batch, computed microbatch by microbatch.

        Frozen parameters have no gradient, and none is computed.
        """
        rng = jax.random.fold_in(self._rng, state.step)
        trained = select(state.params, self.model.is_trained)
        step = state.step - self._first_step

        def loss_fn(trained: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
            return self.model.loss_fn(replace(state.params, trained), batch, rng, step)

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if self.num_microbatches == 1:
            (loss, metrics), grads = value_and_grad(trained, batch, rng)
            return loss, metrics, grads
        normalization = self.model.loss_normalization

        def of_microbatch(index: jax.Array, part: Batch) -> Any:
            part_rng = jax.random.fold_in(rng, index)
            (loss, metrics), grads = value_and_grad(trained, part, part_rng)
            # Weighted by its share, so that the sum over microbatches is the batch's mean.
            share = normalization(part) / normalization(batch)
            loss, grads = jax.tree.map(lambda x: x * share, (loss, grads))
            return loss, metrics, grads

        def accumulate(total: Any, indexed: Any) -> tuple[Any, None]:
            loss, metrics, grads = of_microbatch(*indexed)
            grads = jax.tree.map(jnp.add, total[2], grads)
            return (total[0] + loss, merge_metrics(total[1], metrics), grads), None

        indexed = jnp.arange(self.num_microbatches), _split_batch(batch, self.num_microbatches)
        first = jax.tree.map(lambda x: x[0], indexed)
        shapes = jax.eval_shape(of_microbatch, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (loss, metrics, grads), _ = jax.lax.scan(accumulate, zeros, indexed)
        return loss, metrics, grads
