"""A model is a network, an objective and a decoder, behind the interface that T5X expects.

T5X's trainer, evaluation and inference ask a model object for the attributes and methods below and
check no base class, so these objects run in T5X's runtime as they run in ours. The module is
long because that contract is one object's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import clu.metrics
import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
import seqio

from diffusion_t5x.decoding.compatibility import check_decoder, check_tokens
from diffusion_t5x.decoding.logits_rules import check_rules
from diffusion_t5x.interfaces import FIXED_FEATURE, Decoder, Fixed, Objective, SteppedDecoder
from diffusion_t5x.names import check_known
from diffusion_t5x.networks import bound_network
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.objectives import losses
from diffusion_t5x.objectives.attention_patterns import AUTOREGRESSIVE_PATTERNS, Opening

Array = jax.Array
Batch = Mapping[str, Array]
MetricsMap = dict[str, clu.metrics.Average]
COSTS = ("steps", "passes", "positions")  # fields of `interfaces.Decoded`


@flax.struct.dataclass
class AverageByParts(clu.metrics.Average):
    """Averages in parts, such as of a range: `total` and `count` are `[parts]`.

    `compute` returns the mean of the averages, in which parts of no weight do not count; it thus
    depends less than the plain average on which parts the examples happened to fall into.
    """

    names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def merge(self, other: clu.metrics.Average) -> AverageByParts:
        return self.replace(total=self.total + other.total, count=self.count + other.count)

    def parts(self) -> dict[str, float]:
        """Returns the averages of the parts by their names, without those of no weight."""
        pairs = zip(self.names, self.total, self.count, strict=True)
        return {name: float(total / count) for name, total, count in pairs if count > 0}

    def compute(self) -> Any:
        counted = self.count > 0
        averages = jnp.where(counted, self.total / jnp.where(counted, self.count, 1.0), 0.0)
        return jnp.sum(averages) / jnp.sum(counted)


def make_metric(name: str, total: Array, count: Array) -> clu.metrics.Average:
    """Returns the metric of two sums, as `interfaces.Metrics` has them.

    The parts of 'X/by_Y' are named by their upper ends, such as 'X/Y_0.1'.
    """
    if not total.shape:
        return clu.metrics.Average(total=total, count=count)
    stem, parts = name.replace("/by_", "/"), len(total)
    names = tuple(f"{stem}_{(index + 1) / parts:.4g}" for index in range(parts))
    return AverageByParts(total=total, count=count, names=names)


class Model:
    """Binds network, objective and decoder to T5X's model contract.

    AR, diffusion and AR2Diff differ only in which objective and decoder are bound, and in the
    checkpoint that training starts from.

    Attributes:
      module: the network, `networks.DecoderOnly` or `networks.EncoderDecoder`.
      objective: the loss and the score.
      decoder: the sampler.
      input_vocabulary: the vocabulary of the prefixes.
      output_vocabulary: the vocabulary of the targets.
      optimizer_def: updates the parameters; only the trainer looks inside.
      loss_normalizing_factor: see `losses.normalize_weights`.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        decoder: Decoder,
        vocabulary: seqio.Vocabulary,
        optimizer_def: Any,
        loss_normalizing_factor: losses.LossNormalizingFactor = None,
    ):
        """Checks that the parts fit together; `vocabulary` is that of prefixes and targets.

        Raises:
          ValueError: if the network has fewer embeddings than the vocabulary or the corruption has
            tokens, a logits rule names others or leaves none to draw, the objective shifts and the
            network cannot, objective and decoder disagree (see `check_decoder`), the decoder ends
            texts with another token than the vocabulary, or T5X's optimizer would train what
            `TransformerConfig.low_rank` freezes.
        """
        rows = module.config.vocab_size
        if vocabulary.vocab_size > rows:
            raise ValueError(
                f"TransformerConfig.vocab_size = {rows}, but the vocabulary has "
                f"{vocabulary.vocab_size} tokens; set VOCAB_SIZE to at least that."
            )
        check_tokens(objective, decoder, rows, module.config.extra_tokens)
        smoothing = getattr(getattr(objective, "cross_entropy", None), "label_smoothing", 0.0)
        if smoothing and any(token < rows for token in objective.forbidden):
            raise ValueError(
                f"label_smoothing = {smoothing}, but {type(objective).__name__} forbids the tokens "
                f"{objective.forbidden}, which smoothing would predict; set LABEL_SMOOTHING = 0."
            )
        if getattr(objective, "shift", False) and isinstance(module, EncoderDecoder):
            raise ValueError(
                f"{type(objective).__name__}.shift = True, but the first position of an "
                "encoder-decoder's canvas has none before it; use a decoder-only network, or set "
                "SHIFT = False."
            )
        end = getattr(decoder, "eos_id", -1)
        if end >= 0 and vocabulary.eos_id is not None and end != vocabulary.eos_id:
            raise ValueError(
                f"{type(decoder).__name__}.eos_id = {end}, but the vocabulary ends texts with "
                f"token {vocabulary.eos_id}; set it to that."
            )
        check_decoder(objective, decoder)
        check_rules(getattr(decoder, "logits_rules", ()), rows, objective.forbidden)
        ours = optimizer_def is None or isinstance(optimizer_def, optax.GradientTransformation)
        if module.config.low_rank is not None and not ours:
            raise ValueError(
                "TransformerConfig.low_rank: T5X's optimizers train every parameter. Train with "
                "`python -m diffusion_t5x.train`; `python -m diffusion_t5x.convert` merges the "
                "result into an ordinary checkpoint."
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
        """The SeqIO feature converter that makes the objective's batches."""
        from diffusion_t5x.data import feature_converters

        if self.objective.packs:
            return feature_converters.EncDecFeatureConverter
        return feature_converters.CanvasFeatureConverter

    def get_initial_variables(
        self,
        rng: Array,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Initialises variables for features of `input_shapes`; tokens are int32 in any case.

        Raises:
          ValueError: if a pattern of `LowRank` matches nothing.
        """
        del input_types
        prefix = jnp.zeros(input_shapes["encoder_input_tokens"], jnp.int32)
        target = jnp.zeros(input_shapes["decoder_input_tokens"], jnp.int32)
        variables = dict(self.module.init(rng, prefix, target, self.objective.attention_pattern))
        if self.module.config.low_rank is not None:
            names = flax.traverse_util.flatten_dict(variables["params"], sep="/")
            self.module.config.low_rank.check(names)
        return variables

    def is_trained(self, name: str) -> bool:
        """Returns whether a parameter, such as 'decoder/layers_0/mlp/wo/kernel', is trained."""
        low_rank = self.module.config.low_rank
        return low_rank is None or low_rank.trains(name)

    def loss_fn(
        self, params: Any, batch: Batch, dropout_rng: Array | None, step: Array | None = None
    ) -> tuple[Array, MetricsMap]:
        """Computes the summed loss over `loss_normalization(batch)`, and metrics.

        Args:
          batch: features `[batch, length]` as in `docs/architecture.md`.
          dropout_rng: the key for all randomness of the step, corruption included; None for that
            of `eval_fn`.
          step: steps of the run before this one, which objectives with `opening_steps` need.

        Raises:
          ValueError: if such an objective gets no step, as T5X's trainer has none to give.
        """
        if dropout_rng is None:
            return self.eval_fn(params, batch)
        opening_steps = getattr(self.objective, "opening_steps", 0)
        if not opening_steps:
            return self._loss(params, batch, dropout_rng, deterministic=False)
        if step is None:
            raise ValueError(
                f"{type(self.objective).__name__}.opening_steps = {opening_steps} needs the step, "
                "which T5X's trainer does not hand on; set OPENING_STEPS = 0, or train with "
                "python -m diffusion_t5x.train."
            )
        opening_rng, rng = jax.random.split(dropout_rng)
        share = jnp.minimum(1.0, (step + 1) / opening_steps)
        opening = Opening(share, opening_rng)
        loss, metrics = self._loss(params, batch, rng, deterministic=False, opening=opening)
        return loss, metrics | {"openness": clu.metrics.Average(total=share, count=jnp.float32(1))}

    def eval_fn(self, params: Any, batch: Batch) -> tuple[Array, MetricsMap]:
        """Computes the loss, its randomness fixed by the batch's tokens, without dropout."""
        return self._loss(params, batch, _fixed_rng(batch), deterministic=True)

    def loss_normalization(self, batch: Batch) -> Array:
        """Computes the normaliser, by which the trainer weighs microbatches.

        Accumulating their gradients is therefore exact.
        """
        return self._normalize(batch, self._targets(batch)[1])[1]

    def _targets(self, batch: Batch) -> tuple[Array, Array]:
        """Returns targets and the objective's weights of them, each `[batch, length]`."""
        targets = batch["decoder_target_tokens"]
        weights = batch.get("decoder_loss_weights", targets > 0).astype(jnp.float32)
        if FIXED_FEATURE in batch:
            weights *= batch[FIXED_FEATURE] == 0
        return targets, self.objective.token_weights(targets, weights)

    def _normalize(self, batch: Batch, weights: Array) -> tuple[Array, Array]:
        segment_ids = batch.get("decoder_segment_ids")
        return losses.normalize_weights(self.loss_normalizing_factor, weights, segment_ids)

    def _loss(
        self, params: Any, batch: Batch, rng: Array, **settings: Any
    ) -> tuple[Array, MetricsMap]:
        network_rng, objective_rng = jax.random.split(rng)
        network = self.bind(params, batch, network_rng, **settings)
        targets, weights = self._targets(batch)
        weights, normalizer = self._normalize(batch, weights)
        given = FIXED_FEATURE in batch
        fixed = {"fixed": batch[FIXED_FEATURE] != 0} if given else {}
        loss_sum, weight_sum, sums = self.objective.loss(
            network, targets, weights, objective_rng, **fixed
        )
        sums = {"loss": (loss_sum, weight_sum), **sums}
        metrics = {name: make_metric(name, *pair) for name, pair in sums.items()}
        return loss_sum / normalizer, metrics

    def bind(
        self, params: Any, batch: Batch, rng: Array | None = None, **settings: Any
    ) -> bound_network.BoundNetwork:
        """Binds parameters and the batch's prefixes to the network, as the objective reads it."""
        return bound_network.bind(
            self.module,
            params,
            batch,
            **self._reading,
            rng=rng,
            **settings,
        )

    @property
    def _reading(self) -> dict[str, Any]:
        """How the objective has texts read, as `bound_network` takes it."""
        return {
            "attention_pattern": self.objective.attention_pattern,
            "shift": getattr(self.objective, "shift", False),
            "forbidden": self.objective.forbidden,
        }

    def predict_batch(self, params: Any, batch: Batch, rng: Array | None = None) -> Array:
        """Decodes the best tokens of each example: `[batch, length]` int32."""
        return self.predict_batch_with_aux(params, batch, rng)[0]

    def predict_batch_with_aux(
        self,
        params: Any,
        batch: Batch,
        rng: Array | None = None,
        *,
        return_all_decodes: bool = False,
        return_trajectory: bool = False,
        return_cost: bool = False,
        **decoder_params: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """Decodes as many tokens per example as the batch's targets are long.

        Args:
          params: the network's parameters.
          batch: only the prefixes are read, and the length of the targets; and, where the feature
            `decoder_fixed_positions` is not 0, the targets.
          rng: key for the decoder's draws; None for a fixed one.
          return_all_decodes: return every sample, best last.
          return_trajectory: return the canvas of every step, as aux['trajectory']
            `[batch, (num_samples,) num_steps + 1, length]`.
          return_cost: return aux['passes'], aux['positions'] and aux['steps'] (see
            `interfaces.Decoded`), as far as the decoder counts them.
          **decoder_params: override fields of the decoder for this call.

        Returns:
          Tokens `[batch, (num_samples,) length]`, and aux, whose 'scores' are
          `[batch(, num_samples)]`.

        Raises:
          ValueError: if the decoder has no such field, or the objective does not allow its value.
        """
        decoder = _override(self.decoder, decoder_params)
        check_decoder(self.objective, decoder)
        rules, rows = getattr(decoder, "logits_rules", ()), self.module.config.vocab_size
        check_rules(rules, rows, self.objective.forbidden)
        rng = jax.random.PRNGKey(0) if rng is None else rng
        decoded = decoder.decode(
            self.bind(params, batch, many_passes=True),
            batch["decoder_input_tokens"].shape[1],
            rng,
            return_trajectory=return_trajectory,
            **_fixed(batch),
        )
        aux = {"scores": decoded.scores}
        if decoded.trajectory is not None:
            aux["trajectory"] = decoded.trajectory
        tokens = decoded.tokens
        if not return_all_decodes:
            tokens, aux = jax.tree.map(lambda x: x[:, -1], (tokens, aux))
        if return_cost:
            costs = {name: getattr(decoded, name) for name in COSTS}
            aux |= {name: cost for name, cost in costs.items() if cost is not None}
        return tokens, aux

    def start_decoding(self, params: Any, batch: Batch, rng: Array) -> tuple[Any, Any]:
        """Begins what `predict_batch_with_aux` does with the same key, one step at a time.

        Returns:
          What steps read of the prefixes, and the decoder's state: trees of arrays.
        """
        decoder = cast(SteppedDecoder, self.decoder)
        length = batch["decoder_input_tokens"].shape[1]
        network, state = decoder.start(self.bind(params, batch), length, rng, **_fixed(batch))
        bound = cast(bound_network.BoundNetwork | None, network)
        return None if bound is None else bound.prefixes, state

    def decode_step(
        self, params: Any, prefixes: Any, state: Any, batch_size: int, rng: Array
    ) -> Any:
        """Returns the decoder's state after another step, given the result of `start_decoding`."""
        network = bound_network.rebind(self.module, params, prefixes, batch_size, **self._reading)
        return cast(SteppedDecoder, self.decoder).step(network, state, rng)

    def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> Array:
        """Scores targets, `[batch]` float32 in nats, as the objective does: higher is better.

        Its randomness is fixed by the batch's tokens.

        Raises:
          ValueError: if intermediates are asked for, which no network here sows.
        """
        if return_intermediates:
            raise ValueError("return_intermediates = True: these networks sow no intermediates.")
        return self.score_batch_with_aux(params, batch)[0]

    def score_batch_with_aux(self, params: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """Scores targets as `score_batch` does, with what a perplexity needs besides.

        Returns:
          The scores, and aux, both of `[batch]`: 'error', the standard error of a score in nats,
          0 where it is exact; and 'tokens', int32, the tokens of text with weight, the end of text
          among them. Padding that an objective counts is part of its score, and no token of text:
          a text has equally many tokens under every objective.
        """
        targets, weights = self._targets(batch)
        network = self.bind(params, batch)
        score = self.objective.score(network, targets, weights, _fixed_rng(batch))
        tokens = jnp.sum((targets != 0) & (weights > 0), axis=-1, dtype=jnp.int32)
        return score.log_likelihood, {"error": score.error, "tokens": tokens}

    def is_greedy_batch(self, params: Any, batch: Batch, rng: Array | None = None) -> Array:
        """Returns whether greedy decoding writes all targets with a loss weight: `[batch]` bool.

        Of an AR model, each is then the likeliest token after those before it; of any other, its
        decoder writes them, one sample at temperature 0.
        """
        targets = batch["decoder_target_tokens"]
        counted = batch["decoder_loss_weights"] > 0
        if self.objective.attention_pattern in AUTOREGRESSIVE_PATTERNS:
            network = self.bind(params, batch)
            hidden = network.forward(targets, None)
            tokens = losses.CrossEntropy()(hidden, network.logits, targets, counted).tokens
        else:
            all_greedy = ("temperature", 0.0), ("final_temperature", None), ("num_samples", 1)
            known: Any = {name: value for name, value in all_greedy if hasattr(self.decoder, name)}
            tokens = self.predict_batch_with_aux(params, batch, rng, **known)[0]
        return jnp.all((tokens == targets) | ~counted, axis=-1)


def _fixed(batch: Batch) -> dict[str, Fixed]:
    """Returns the batch's fixed positions as an argument of decoders, if it has any.

    Of the targets, decoders get what stands there, and nothing else.
    """
    if FIXED_FEATURE not in batch:
        return {}
    where = batch[FIXED_FEATURE] != 0
    return {"fixed": Fixed(jnp.where(where, batch["decoder_target_tokens"], 0), where)}


def _fixed_rng(batch: Batch) -> Array:
    """Derives a key from the batch's tokens, for evaluation."""
    tokens = batch["decoder_target_tokens"].astype(jnp.uint32)
    index = jnp.arange(1, tokens.size + 1, dtype=jnp.uint32).reshape(tokens.shape)
    return jax.random.fold_in(jax.random.PRNGKey(0), jnp.sum(tokens * index, dtype=jnp.uint32))


def _override(decoder: Any, fields: Mapping[str, Any]) -> Any:
    """Returns the decoder with some fields replaced, after checking that it has them."""
    known = [field.name for field in dataclasses.fields(decoder)]
    for name in fields:
        check_known(name, known, f"decoder parameter of {type(decoder).__name__}")
    return dataclasses.replace(decoder, **fields)
