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
from diffusion_t5x.objectives.attention_patterns import Opening

Array = jax.Array
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

    def forward(self, canvas: Array, rng: Array | None) -> Array:
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
            rngs=dropout_rngs(rng, self.deterministic),
        )

    def logits(self, hidden: Array) -> Array:
        """Computes logits, those of forbidden tokens being `FORBIDDEN_LOGIT`."""
        logits = self._apply(self.module.logits, hidden, self.output_weights)
        if not self.forbidden:
            return logits
        is_forbidden = np.isin(np.arange(logits.shape[-1]), self.forbidden)
        return jnp.where(is_forbidden, FORBIDDEN_LOGIT, logits)

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

    def repeat(self, n: int) -> BoundNetwork:
        context = repeat_rows(self.context, n)
        return dataclasses.replace(self, context=context, batch_size=self.batch_size * n)

    def cache_prefix(self) -> CachedBoundNetwork:
        cache = self._apply(self.module.cache_prefix, self.context, self.attention_pattern)
        return CachedBoundNetwork(**vars(self), cache=cache)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedBoundNetwork(BoundNetwork):
    """An `interfaces.CachedNetwork`; canvases may have any number of rows per cached prefix."""

    cache: KVCache  # keys and values of the prefixes

    @property
    def prefixes(self) -> KVCache:
        return self.cache

    def forward(self, canvas: Array, rng: Array | None) -> Array:
        """Computes hidden states of the canvas, after cached prefixes and without dropout."""
        del rng
        return self._apply(self.module.denoise, self.cache, canvas, self.shift)

    def repeat(self, n: int) -> CachedBoundNetwork:
        return dataclasses.replace(self, batch_size=self.batch_size * n)

    def with_cache(self, cache: KVCache) -> CachedBoundNetwork:
        return dataclasses.replace(self, cache=cache)

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
