"""A network with parameters and prefixes bound: `interfaces.Network` for our flax modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.networks.kv_cache import KVCache, grow, repeat_rows
from diffusion_t5x.networks.layers import multiplies_in_bfloat16, prepare_kernels
from diffusion_t5x.objectives.attention_patterns import CACHED_PATTERNS, Opening
from diffusion_t5x.objectives.logits import chunk_length, map_chunks

Array = jax.Array
CHUNK_LOGITS = 2**22  # of a row, that exist at once for `expect_embedding`
# Low enough to be never drawn and to weigh nothing, finite so that sums and gradients stay finite.
FORBIDDEN_LOGIT = -1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundNetwork:
    """An `interfaces.Network` whose methods apply those of `network.Network`."""

    module: nn.Module
    variables: Mapping[str, Any]  # parameters under 'params'
    attention_pattern: str  # the objective's
    shift: bool = False  # a canvas position is predicted by the state of the token before it
    opening: Opening | None = None  # how much of the pattern is open; None for all of it
    context: Any  # the prefixes, as `module.encode` returns them
    output_weights: Any  # what `module.logits` multiplies by, prepared once for all passes
    segment_ids: Array | None = None  # `[batch, length]` of packed targets
    forbidden: tuple[int, ...] = ()  # tokens that are never predicted
    deterministic: bool = True  # no dropout
    batch_size: int  # number of prefixes

    @property
    def prefixes(self) -> Any:
        """What passes read of the prefixes, a tree of arrays: `rebind` takes it."""
        return self.context

    def _apply(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.module.apply(self.variables, *args, method=method, **kwargs)

    @property
    def self_conditioning(self) -> bool:
        return self.module.config.self_conditioning

    def forward(self, canvas: Array, rng: Array | None, conditioning: Array | None = None) -> Array:
        """Computes hidden states of the canvas after the prefixes as they were encoded."""
        return self._apply(
            self.module.decode,
            self.context,
            canvas,
            self.attention_pattern,
            self.segment_ids,
            deterministic=self.deterministic,
            shift=self.shift,
            opening=self.opening,
            conditioning=conditioning,
            rngs=dropout_rngs(rng, self.deterministic),
        )

    def logits(self, hidden: Array) -> Array:
        """Computes logits, those of forbidden tokens being `FORBIDDEN_LOGIT`."""
        logits = self._apply(self.module.logits, hidden, self.output_weights)
        if not self.forbidden:
            return logits
        is_forbidden = np.isin(np.arange(logits.shape[-1]), self.forbidden)
        return jnp.where(is_forbidden, FORBIDDEN_LOGIT, logits)

    def expect_embedding(
        self, hidden: Array, logits_fn: Callable[[Array], Array] | None = None
    ) -> Array:
        """Averages embeddings over softmax(logits), a chunk of positions at a time.

        `logits_fn` makes other logits of `hidden`, whose last axis may differ; None for `logits`.
        """
        logits_fn = logits_fn or self.logits

        def expect(chunk: Any) -> Array:
            probabilities = jax.nn.softmax(logits_fn(chunk[0]).astype(jnp.float32))
            return self._apply(self.module.expect_embedding, probabilities, self.output_weights)

        length = chunk_length(hidden.shape[1], self.module.config.vocab_size, CHUNK_LOGITS)
        return map_chunks(expect, length, (hidden, (None,)))

    def prefill(self, max_length: int, repeats: int) -> tuple[KVCache, Array]:
        pattern = self.attention_pattern
        return self._apply(self.module.prefill, self.context, pattern, max_length, repeats)

    def append_token(self, cache: KVCache, tokens: Array) -> tuple[KVCache, Array]:
        cache, hidden = self._apply(self.module.append, cache, tokens[:, None])
        return cache, hidden[:, 0]

    def add_room(self, cache: KVCache, room: int) -> KVCache:
        return grow(cache, room)

    def as_causal(self) -> BoundNetwork:
        return dataclasses.replace(self, attention_pattern="causal", shift=False, opening=None)

    def extend_prefix(self, tokens: Array, counts: Array) -> BoundNetwork:
        context = self._apply(self.module.extend, self.context, tokens, counts)
        return dataclasses.replace(self, context=context)

    def read_text(self, targets: Array, rng: Array | None) -> tuple[Array, Array, Array]:
        return self._apply(
            self.module.read_text,
            self.context,
            targets,
            self.attention_pattern,
            deterministic=self.deterministic,
            rngs=dropout_rngs(rng, self.deterministic),
        )

    def drop_prefix(self, dropped: Array) -> BoundNetwork:
        if self.segment_ids is not None:
            raise ValueError("prefixes of packed rows cannot be dropped; set PACK = False.")
        context = self._apply(self.module.drop_prefix, self.context, dropped)
        return dataclasses.replace(self, context=context)

    def repeat(self, n: int) -> BoundNetwork:
        context = repeat_rows(self.context, n)
        return dataclasses.replace(self, context=context, batch_size=self.batch_size * n)

    @property
    def caches_prefix(self) -> bool:
        """Whether the pattern hides canvases from prefixes, and rows have one text each."""
        return self.attention_pattern in CACHED_PATTERNS and self.segment_ids is None

    def cache_blocks(
        self, tokens: Array, block_length: int, rng: Array | None = None
    ) -> CachedBoundNetwork:
        before = tokens.shape[1] - block_length
        counts = jnp.full(self.batch_size, before)
        cached = self.extend_prefix(tokens[:, :before], counts).cache_prefix(rng, self.shift)
        return dataclasses.replace(cached, block_length=block_length)

    def cache_prefix(
        self, rng: Array | None = None, keep_states: bool = False
    ) -> CachedBoundNetwork:
        if self.segment_ids is not None:
            raise ValueError("prefixes of packed rows cannot be cached; set PACK = False.")
        cache = self._apply(
            self.module.cache_prefix,
            self.context,
            self.attention_pattern,
            deterministic=self.deterministic,
            opening=self.opening,
            keep_states=keep_states,
            rngs=dropout_rngs(rng, self.deterministic),
        )
        return CachedBoundNetwork(**vars(self), cache=cache)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedBoundNetwork(BoundNetwork):
    """An `interfaces.CachedNetwork`; canvases may have any number of rows per cached prefix."""

    cache: KVCache  # keys and values of the prefixes
    block_length: int = 0  # canvases are all blocks of this length, the cache ends with clean ones

    @property
    def prefixes(self) -> KVCache:
        return self.cache

    def forward(self, canvas: Array, rng: Array | None, conditioning: Array | None = None) -> Array:
        """Computes hidden states of the canvas after cached prefixes."""
        return self._apply(
            self.module.denoise,
            self.cache,
            canvas,
            self.shift,
            deterministic=self.deterministic,
            opening=self.opening,
            conditioning=conditioning,
            block_length=self.block_length,
            rngs=dropout_rngs(rng, self.deterministic),
        )

    def repeat(self, n: int) -> CachedBoundNetwork:
        return dataclasses.replace(self, batch_size=self.batch_size * n)

    def with_cache(self, cache: KVCache) -> CachedBoundNetwork:
        return dataclasses.replace(self, cache=cache)

    def drop_prefix(self, dropped: Array) -> BoundNetwork:
        raise ValueError("cached prefixes cannot be dropped: drop them before they are cached.")

    def append_tokens(self, cache: KVCache, tokens: Array) -> KVCache:
        return self._apply(self.module.extend_cached, cache, tokens, self.attention_pattern)


def dropout_rngs(rng: Array | None, deterministic: bool) -> dict[str, Array]:
    """Returns the keys that flax's `apply` needs: none where there is no dropout."""
    return {} if deterministic or rng is None else {"dropout": rng}


def bind(
    module: nn.Module,
    params: Any,
    batch: Mapping[str, Array],
    attention_pattern: str,
    *,
    shift: bool = False,
    opening: Opening | None = None,
    forbidden: tuple[int, ...] = (),
    rng: Array | None = None,
    deterministic: bool = True,
    many_passes: bool = False,
) -> BoundNetwork:
    """Binds parameters and the prefixes of a batch, which are encoded once; `rng` is for dropout.

    The prefixes are its `encoder_input_tokens [batch, length]`; segment ids are read if it has any.
    With `many_passes` kernels are prepared for decoding, and there is no gradient. The other
    arguments are the fields of `BoundNetwork`.

    Raises:
      ValueError: if texts may be longer than the network's learned positions.
    """
    variables = {"params": prepare_kernels(params, module.config.dtype) if many_passes else params}
    prefixes = batch["encoder_input_tokens"]
    if (limit := module.config.max_positions) is not None:
        longest = prefixes.shape[1] + batch["decoder_input_tokens"].shape[1]
        if longest > limit:
            raise ValueError(
                f"prefix and target have up to {longest} tokens, but TransformerConfig."
                f"max_positions = {limit}; set TASK_FEATURE_LENGTHS to at most that in all."
            )
    context = module.apply(
        variables,
        prefixes,
        batch.get("encoder_segment_ids"),
        method=module.encode,
        deterministic=deterministic,
        rngs=dropout_rngs(rng, deterministic),
    )
    weights: Any = module.apply(variables, prefixes.shape[0], method=module.output_weights)
    if many_passes and multiplies_in_bfloat16(module.config):
        weights = weights.astype(jnp.bfloat16)
    return BoundNetwork(
        module=module,
        variables=variables,
        attention_pattern=attention_pattern,
        shift=shift,
        opening=opening,
        context=context,
        output_weights=weights,
        segment_ids=batch.get("decoder_segment_ids"),
        forbidden=forbidden,
        deterministic=deterministic,
        batch_size=prefixes.shape[0],
    )


def rebind(
    module: nn.Module,
    params: Any,
    prefixes: Any,
    batch_size: int,
    attention_pattern: str,
    *,
    shift: bool = False,
    forbidden: tuple[int, ...] = (),
) -> BoundNetwork:
    """Binds parameters and the `BoundNetwork.prefixes` of a batch; None for those that none reads.

    There is no dropout, and nothing is packed.
    """
    variables = {"params": params}
    bound = BoundNetwork(
        module=module,
        variables=variables,
        attention_pattern=attention_pattern,
        shift=shift,
        context=prefixes,
        output_weights=module.apply(variables, batch_size, method=module.output_weights),
        forbidden=forbidden,
        batch_size=batch_size,
    )
    is_cached = isinstance(prefixes, KVCache)
    return CachedBoundNetwork(**vars(bound), cache=prefixes) if is_cached else bound
