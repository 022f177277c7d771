"""The one configuration of all networks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# What is kept of a layer's activations for the backward pass; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION_KERNELS = ("xla", "fused")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a transformer of T5 1.1's kind.

    Attributes:
      vocab_size: rows of the token embedding; at least the vocabulary's size.
      embed_dim: width of the residual stream.
      num_heads: attention heads.
      num_layers: layers of the decoder-only stack, or of the decoder.
      num_encoder_layers: layers of the encoder, where there is one; None for `num_layers`.
      head_dim: width of a head.
      mlp_dim: width of the feed-forward layers.
      mlp_activations: one activation per input projection, multiplied; 'linear' for none.
      dropout_rate: of embeddings, attention weights, feed-forward and residual branches.
      tied_logits: use the embedding, divided by sqrt(embed_dim), as the output projection.
      dtype: of activations, 'float32' or 'bfloat16'; parameters and logits are float32.
      remat: 'none', 'dots' (keep matrix products with weights) or 'full' (keep nothing).
      attention_block_logits: attention logits that a device may have alive at once. More are
        computed in blocks of rows, and again for the gradient, which keeps none of them.
      attention_kernel: 'xla', or 'fused' for one kernel that keeps no attention logits in main
        memory, on TPUs from v5 on and where `flash_attention.applies`; elsewhere, with dropout, and
        for gradients, that is as 'xla'.
      scan_layers: compile one layer and scan over it; parameters get a leading `layers` axis.
      relative_buckets: buckets of relative distances, half of them backwards, half forwards.
        Causal attention never asks for the forward half, so that a network pretrained causally
        keeps the meaning of its buckets when it goes on as a bidirectional one (AR2Diff).
      decoder_relative_buckets: the same for the decoder alone; None for `relative_buckets`. 64
        hold the table of T5's decoders, all of whose 32 buckets are for distances backwards.
      relative_max_distance: tokens, beyond which all distances share a bucket.
      relative_bias_per_layer: give each layer a table of distances of its own, as T5X's
        `scalable_t5` does, instead of one that the layers of a stack share.
      start_token: begin each text of a decoder-only network with a 0, as T5X's does.
    """

    vocab_size: int
    embed_dim: int
    num_heads: int
    num_layers: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int | None = None
    mlp_activations: Sequence[str] = ("gelu", "linear")
    dropout_rate: float = 0.0
    tied_logits: bool = True
    dtype: str | jnp.dtype = "float32"
    remat: str = "none"
    attention_block_logits: int = 2**20
    attention_kernel: str = "xla"
    scan_layers: bool = False
    relative_buckets: int = 32
    decoder_relative_buckets: int | None = None
    relative_max_distance: int = 128
    relative_bias_per_layer: bool = False
    start_token: bool = False

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        sizes = ("vocab_size", "embed_dim", "num_heads", "num_layers", "head_dim", "mlp_dim")
        sizes += ("attention_block_logits",)
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        for name in ("relative_buckets", "decoder_buckets"):
            if getattr(self, name) < 4 or getattr(self, name) % 2:
                raise ValueError(
                    f"{name.replace('decoder_', 'decoder_relative_')} = {getattr(self, name)}; "
                    "expected an even number of at least 4: half for each direction."
                )
        for name, known in (("remat", REMAT_POLICIES), ("attention_kernel", ATTENTION_KERNELS)):
            value = getattr(self, name)
            if value not in known:
                near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{name} = {value!r} is unknown; did you mean {near!r}? "
                    f"Known: {', '.join(known)}."
                )
        for activation in self.mlp_activations:
            if activation != "linear" and not hasattr(jax.nn, activation):
                raise ValueError(
                    f"mlp_activations has {activation!r}; expected 'linear' or the name of a "
                    "function in jax.nn, such as 'gelu'."
                )

    @property
    def decoder_buckets(self) -> int:
        """Buckets of relative distances in the decoder."""
        return self.decoder_relative_buckets or self.relative_buckets
