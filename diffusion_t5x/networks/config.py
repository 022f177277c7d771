"""The configuration of all networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion_t5x.names import check_known

# Activations of a layer that are saved for the backward pass; the others are recomputed.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION_KERNELS = ("xla", "fused")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a transformer with T5 1.1's architecture."""

    vocab_size: int
    """Rows of the token embedding; at least the size of the vocabulary."""
    embed_dim: int
    """Width of the residual stream."""
    num_heads: int
    """Attention heads."""
    num_layers: int
    """Layers of the decoder-only stack, or of the decoder."""
    head_dim: int
    """Width of an attention head."""
    mlp_dim: int
    """Width of the feed-forward layers."""
    num_encoder_layers: int | None = None
    """Layers of the encoder, if there is one; None for `num_layers`."""
    mlp_activations: Sequence[str] = ("gelu", "linear")
    """One activation per input projection, whose results are multiplied; 'linear' for none."""
    dropout_rate: float = 0.0
    """Dropout of embeddings, attention weights, feed-forward activations and residual branches."""
    tied_logits: bool = True
    """Use the embedding, divided by sqrt(embed_dim), as the output projection."""
    dtype: str | jnp.dtype = "float32"
    """Type of activations, 'float32' or 'bfloat16'; parameters and logits are float32."""
    remat: str = "none"
    """Activations saved for the backward pass: 'none' to save all, 'dots' to save products with
    weights and recompute the rest, 'full' to recompute everything."""
    attention_block_logits: int = 2**20
    """Maximum number of attention logits that a device holds at a time. If a layer has more,
    attention runs over chunks of rows, one after the other, and the backward pass recomputes their
    logits instead of saving them."""
    attention_kernel: str = "xla"
    """'xla', or 'fused' for an experimental Pallas kernel for TPU v5 and later, which keeps no
    attention logits in main memory. 'fused' falls back to 'xla' for gradients, with dropout, and
    wherever `flash_attention.applies` is False."""
    scan_layers: bool = False
    """Compile one layer and scan over it; parameters get a leading `layers` axis."""
    relative_buckets: int = 32
    """Buckets of relative distances, half of them backwards, half forwards. Causal attention never
    uses the forward half, so that a network pretrained causally keeps the meaning of its buckets
    when it is trained further as a bidirectional one (AR2Diff)."""
    decoder_relative_buckets: int | None = None
    """`relative_buckets` for the decoder alone; None for the same. 64 hold the table of T5's
    decoders, all of whose 32 buckets are for distances backwards."""
    relative_max_distance: int = 128
    """Distance in tokens beyond which all distances share a bucket."""
    relative_bias_per_layer: bool = False
    """Give each layer a relative position bias of its own, as T5X's `scalable_t5` does, instead of
    one that all layers of a stack share."""
    start_token: bool = False
    """Begin each text of a decoder-only network with a 0, as T5X's decoder-only network does."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in (
            "vocab_size",
            "embed_dim",
            "num_heads",
            "num_layers",
            "head_dim",
            "mlp_dim",
            "attention_block_logits",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; expected at least 1.")
        for name in ("relative_buckets", "decoder_buckets"):
            if getattr(self, name) < 4 or getattr(self, name) % 2:
                raise ValueError(
                    f"{name.replace('decoder_', 'decoder_relative_')} = {getattr(self, name)}; "
                    "expected an even number of at least 4: half for each direction."
                )
        check_known(self.remat, REMAT_POLICIES, "remat")
        check_known(self.attention_kernel, ATTENTION_KERNELS, "attention_kernel")
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
