"""A model is a network, an objective and a decoder, behind the interface that T5X expects.

T5X's trainer, evaluation and inference ask a model object for the attributes and methods below
and check no base class, so these objects run in T5X's runtime as they run in ours.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_t5x.interfaces import BoundNetwork, CachedPrefix
from diffusion_t5x.networks.attention import repeat_rows
from diffusion_t5x.networks.kv_cache import grow
from diffusion_t5x.objectives import losses

Array = jax.Array
Batch = Mapping[str, Array]
MetricsMap = dict[str, clu.metrics.Average]


class Model:
    """Binds network, objective and decoder to T5X's model contract.

    AR, diffusion and AR2Diff differ only in which objective and decoder are bound, and in the
    checkpoint that training starts from.

    Attributes:
      module: the network, `networks.DecoderOnly` or `networks.EncoderDecoder`.
      objective: the loss, an object of `objectives`.
      decoder: the sampler, an object of `decoding`.
      input_vocabulary: of the prefixes, a `seqio.Vocabulary`.
      output_vocabulary: of the targets, a `seqio.Vocabulary`.
      optimizer_def: what the trainer updates parameters with; opaque here.
      loss_normalizing_factor: see `losses.normalize_weights`.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Any,
        decoder: Any,
        vocabulary: Any,
        optimizer_def: Any,
        loss_normalizing_factor: losses.LossNormalizingFactor = None,
    ):
        """Checks that the parts fit together.

        Raises:
          ValueError: if the network has fewer embeddings than the vocabulary has tokens, the
            objective or decoder draws tokens that the network does not know, they cut texts into
            blocks of different lengths, or the decoder ends texts with another token than the
            vocabulary.
        """
        rows = module.config.vocab_size
        if vocabulary.vocab_size > rows:
            raise ValueError(
                f"TransformerConfig.vocab_size = {rows}, but the vocabulary has "
                f"{vocabulary.vocab_size} tokens; set VOCAB_SIZE to at least that."
            )
        for part in (objective, decoder):
            drawn = getattr(getattr(part, "corruption", None), "vocab_size", 0)
            if drawn > rows:
                raise ValueError(
                    f"{type(part).__name__}.corruption.vocab_size = {drawn}, but the network knows "
                    f"only {rows} tokens; set VOCAB_SIZE for both."
                )
        trained, decoded = (getattr(part, "block_length", 0) for part in (objective, decoder))
        if trained != decoded:
            raise ValueError(
                f"{type(decoder).__name__}.block_length = {decoded}, but the model is trained with "
                f"{type(objective).__name__}.block_length = {trained}; set BLOCK_LENGTH for both."
            )
        end = getattr(decoder, "eos_id", -1)
        if end >= 0 and vocabulary.eos_id is not None and end != vocabulary.eos_id:
            raise ValueError(
                f"{type(decoder).__name__}.eos_id = {end}, but the vocabulary ends texts with "
                f"token {vocabulary.eos_id}; set it to that."
            )
        losses.normalize_weights(loss_normalizing_factor, jnp.ones((1, 1)))
        self.module = module
        self.objective = objective
        self.decoder = decoder
        self.input_vocabulary = vocabulary
        self.output_vocabulary = vocabulary
        self.optimizer_def = optimizer_def
        self.loss_normalizing_factor = loss_normalizing_factor

    @property
    def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:
        """The SeqIO feature converter that the objective's batches come from."""
        from diffusion_t5x.data import feature_converters

        if self.objective.packs:
            return feature_converters.EncDecFeatureConverter
        return feature_converters.CanvasFeatureConverter

    def get_initial_variables(
        self,
        rng: Array,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """Fresh variables: 'params', and 'params_axes' with their logical axes.

        Args:
          rng: for the initial parameters.
          input_shapes: shape of each batch feature.
          input_types: dtype of each batch feature; tokens are int32 in any case.
        """
        del input_types
        prefix = jnp.zeros(input_shapes["encoder_input_tokens"], jnp.int32)
        target = jnp.zeros(input_shapes["decoder_input_tokens"], jnp.int32)
        return self.module.init(rng, prefix, target, self.objective.attention_pattern)

    def loss_fn(
        self, params: Any, batch: Batch, dropout_rng: Array | None
    ) -> tuple[Array, MetricsMap]:
        """Loss of a batch, for training.

        Args:
          params: the network's parameters.
          batch: features as in `docs/architecture.md`, each `[batch, length]`.
          dropout_rng: for all randomness of the step, corruption included; None evaluates, with
            no dropout and the fixed randomness of `eval_fn`.

        Returns:
          The summed loss over `loss_normalization(batch)`, and metrics that merge over batches.
        """
        if dropout_rng is None:
            return self.eval_fn(params, batch)
        return self._loss(params, batch, dropout_rng, deterministic=False)

    def eval_fn(self, params: Any, batch: Batch) -> tuple[Array, MetricsMap]:
        """As `loss_fn`, without dropout and with randomness fixed by the batch's tokens."""
        tokens = batch["decoder_target_tokens"].astype(jnp.uint32)
        index = jnp.arange(1, tokens.size + 1, dtype=jnp.uint32).reshape(tokens.shape)
        rng = jax.random.fold_in(jax.random.PRNGKey(0), jnp.sum(tokens * index, dtype=jnp.uint32))
        return self._loss(params, batch, rng, deterministic=True)

    def loss_normalization(self, batch: Batch) -> Array:
        """What the summed loss of `batch` is divided by: a scalar.

        The trainer weighs microbatches by it, so that accumulating their gradients is exact.
        """
        return self._weights(batch)[1]

    def _weights(self, batch: Batch) -> tuple[Array, Array]:
        """Loss weights `[batch, length]` and the normalizer."""
        targets = batch["decoder_target_tokens"]
        weights = batch.get("decoder_loss_weights", targets > 0).astype(jnp.float32)
        return losses.normalize_weights(
            self.loss_normalizing_factor,
            self.objective.token_weights(targets, weights),
            batch.get("decoder_segment_ids"),
        )

    def _loss(
        self, params: Any, batch: Batch, rng: Array, *, deterministic: bool
    ) -> tuple[Array, MetricsMap]:
        network_rng, objective_rng = jax.random.split(rng)
        network = self._bind(params, batch, network_rng, deterministic=deterministic)
        weights, normalizer = self._weights(batch)
        loss_sum, weight_sum, sums = self.objective.loss(
            network, batch["decoder_target_tokens"], weights, objective_rng
        )
        sums = {"loss": (loss_sum, weight_sum), **sums}
        metrics = {
            name: clu.metrics.Average(total=total, count=count)
            for name, (total, count) in sums.items()
        }
        return loss_sum / normalizer, metrics

    def _bind(
        self,
        params: Any,
        batch: Batch,
        rng: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> BoundNetwork:
        """The network with parameters and prefixes bound; prefixes are encoded once."""
        variables = {"params": params}
        module, pattern = self.module, self.objective.attention_pattern
        segment_ids = batch.get("decoder_segment_ids")

        def rngs(rng: Array | None) -> dict[str, Array]:
            return {} if deterministic else {"dropout": rng}

        def apply(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return module.apply(variables, *args, method=method, **kwargs)

        context = apply(
            module.encode,
            batch["encoder_input_tokens"],
            batch.get("encoder_segment_ids"),
            deterministic=deterministic,
            rngs=rngs(rng),
        )

        weights = apply(module.output_weights, batch["encoder_input_tokens"].shape[0])

        def bind(context: Any, batch_size: int) -> BoundNetwork:
            return BoundNetwork(
                batch_size=batch_size,
                forward=lambda canvas, rng: apply(
                    module.decode,
                    context,
                    canvas,
                    pattern,
                    segment_ids,
                    deterministic=deterministic,
                    rngs=rngs(rng),
                ),
                logits=lambda hidden: apply(module.logits, hidden, weights),
                prefill=lambda length, repeats: apply(
                    module.prefill, context, pattern, length, repeats
                ),
                step=lambda cache, tokens: apply(module.step, cache, tokens, pattern),
                grow=grow,
                extend=lambda *tokens: bind(apply(module.extend, context, *tokens), batch_size),
                repeat=lambda n: bind(repeat_rows(context, n), batch_size * n),
                with_cached_prefix=lambda: cached(bind(context, batch_size), context),
                read_once=context.read_once,
                reread=context.reread,
            )

        def cached(network: BoundNetwork, context: Any) -> BoundNetwork:
            return with_cache(network, apply(module.cache_prefix, context, pattern))

        def with_cache(network: BoundNetwork, cache: Any) -> BoundNetwork:
            prefix = CachedPrefix(
                cache=cache,
                with_cache=lambda cache: with_cache(network, cache),
                grow=grow,
                extend=lambda cache, tokens: apply(module.extend_cached, cache, tokens, pattern),
                forward_keeping=lambda canvas: apply(module.denoise, cache, canvas),
                forward_at=lambda *canvas: apply(module.denoise_at, cache, *canvas),
            )
            return _with_cached(network, prefix)

        return bind(context, batch["encoder_input_tokens"].shape[0])

    def predict_batch(self, params: Any, batch: Batch, rng: Array | None = None) -> Array:
        """The best decoded tokens of each example: `[batch, length]` int32."""
        return self.predict_batch_with_aux(params, batch, rng)[0]

    def predict_batch_with_aux(
        self,
        params: Any,
        batch: Batch,
        rng: Array | None = None,
        *,
        return_all_decodes: bool = False,
        return_trajectory: bool = False,
        return_position_forwards: bool = False,
        **decoder_params: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """Decodes as many tokens per example as the batch's targets are long.

        Args:
          params: the network's parameters.
          batch: only the prefixes are read, and the length of the targets.
          rng: for the decoder's draws; None for a fixed one.
          return_all_decodes: return every sample, best last.
          return_trajectory: also return the canvas of every step, as aux['trajectory']
            `[batch, (num_samples,) num_steps + 1, length]`.
          return_position_forwards: also return what decoding cost, as aux['position_forwards']
            `[batch]` (see `decoding.rerank.Decoded`).
          **decoder_params: override fields of the decoder for this call.

        Returns:
          Tokens `[batch, length]`, or `[batch, num_samples, length]` with all decodes, and
          `{'scores': [batch] or [batch, num_samples]}`; higher is better.

        Raises:
          ValueError: if the decoder has no such field.
        """
        decoder = _override(self.decoder, decoder_params)
        rng = jax.random.PRNGKey(0) if rng is None else rng
        decoded = decoder.decode(
            self._bind(params, batch),
            batch["decoder_input_tokens"].shape[1],
            rng,
            return_trajectory=return_trajectory,
        )
        aux = {"scores": decoded.scores}
        if return_trajectory:
            aux["trajectory"] = decoded.trajectory
        result = decoded.tokens, aux
        if not return_all_decodes:
            result = jax.tree.map(lambda x: x[:, -1], result)
        if return_position_forwards:
            aux = {**result[1], "position_forwards": decoded.position_forwards}
            result = result[0], aux
        return result

    def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> Array:
        """Scores of the given targets, higher is better: `[batch]`.

        The log-likelihood under an AR objective, the model score under diffusion.

        Raises:
          ValueError: if intermediates are asked for, which no network here sows.
        """
        if return_intermediates:
            raise ValueError("return_intermediates = True: these networks sow no intermediates.")
        targets = batch["decoder_target_tokens"]
        weights = batch.get("decoder_loss_weights", targets > 0).astype(jnp.float32)
        weights = self.objective.token_weights(targets, weights)
        return self.objective.score(self._bind(params, batch), targets, weights)


def _with_cached(network: BoundNetwork, cached: CachedPrefix) -> BoundNetwork:
    """The network with a `forward` that takes any number of rows per prefix and rereads none."""
    return dataclasses.replace(
        network,
        forward=lambda canvas, rng: cached.forward_keeping(canvas)[0],
        repeat=lambda n: _with_cached(network.repeat(n), cached),
        cached=cached,
        read_once=network.read_once + network.reread,
        reread=0,
    )


def _override(decoder: Any, fields: Mapping[str, Any]) -> Any:
    """The decoder with some fields replaced."""
    known = [field.name for field in dataclasses.fields(decoder)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"decoder parameter {name!r} is unknown to {type(decoder).__name__}; "
                f"did you mean {near!r}? Known: {', '.join(known)}."
            )
    return dataclasses.replace(decoder, **fields)
