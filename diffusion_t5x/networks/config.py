"""The configuration of all networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_t5x.names import check_known
from diffusion_t5x.networks.low_rank import LowRank

# Activations of a layer that are saved for the backward pass; the others are recomputed.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION_KERNELS = ("xla", "fused")
# Layers from which on models are given scanned ones, which compile in a fraction of the time.
SCANNED_FROM = 8
POSITIONS = ("relative_bias", "rotary", "learned")
NORMS = ("rms", "rms_plus_one", "layer")
ROPE_SCALINGS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered, for texts longer than those of pretraining."""

    kind: str
    """'linear' divides all of them; 'llama3' (Llama 3.1) only those whose wavelength is long beside
    `original_max_positions`."""
    factor: float
    """What frequencies are divided by."""
    low_freq_factor: float = 1.0
    """'llama3': frequencies with fewer turns in `original_max_positions` are divided in full."""
    high_freq_factor: float = 4.0
    """'llama3': frequencies with more turns than this stay; those between are interpolated."""
    original_max_positions: int = 8192
    """'llama3': length of texts in pretraining."""

    def __post_init__(self) -> None:
        check_known(self.kind, ROPE_SCALINGS, "RopeScaling.kind")
        if self.factor < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"{self}: expected factor >= 1 and 0 < low_freq_factor < high_freq_factor."
            )


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a transformer; the defaults are T5 1.1's architecture.

    Decoder-only networks may also be of the families of Llama, Qwen, Gemma and GPT-2, whose
    settings `interop.hf_names.config_of` reads from their `config.json`.
    """

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
    """One activation per input projection, whose results are multiplied: 'linear' for none, the
    name of a function in jax.nn, whose 'gelu' is the tanh approximation, or 'gelu_exact'."""
    dropout_rate: float = 0.0
    """Dropout of embeddings, attention weights, feed-forward activations and residual branches."""
    tied_logits: bool = True
    """Use the embedding as the output projection."""
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
    """'xla', or 'fused' for experimental Pallas kernels for NVIDIA GPUs and for TPU v5 and later,
    which keep no attention logits in main memory, nor those of gradients. 'fused' falls back to
    'xla' with dropout, with a soft cap, and wherever `fused_attention.platforms` names none, as for
    grouped queries on TPUs."""
    scan_layers: bool = False
    """Compile one layer and scan over it; parameters get a leading `layers` axis. Checkpoints are
    read in either layout. Model files of `SCANNED_FROM` layers and more set it."""
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
    """Begin each text of a decoder-only network with a 0, as T5X's decoder-only network does. Other
    families have a token of the vocabulary there, which is part of the text."""
    positions: str = "relative_bias"
    """How attention knows positions: 'relative_bias', T5's buckets of distances; 'rotary' (Su et
    al. 2021), which turns queries and keys; 'learned', a vector per position that is added to the
    embedding, as in GPT-2."""
    max_positions: int | None = None
    """Rows of the table of 'learned' positions: the longest text, prefix and target together."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of 'rotary' positions."""
    rope_local_theta: float | None = None
    """Base for layers with a sliding window, not scaled; None to treat all layers alike."""
    rope_scaling: RopeScaling | Mapping[str, Any] | None = None
    """Lowers the frequencies of 'rotary' positions; in gin {'kind': 'linear', 'factor': 4.0}."""
    num_kv_heads: int | None = None
    """Heads of keys and values, each of which serves equally many neighbouring heads of queries
    (grouped queries, Ainslie et al. 2023); None for `num_heads`. Caches hold these heads alone."""
    attention_scale: float | None = None
    """What attention logits are multiplied by; None for T5's 1, for which the query's kernel begins
    smaller."""
    attention_softcap: float | None = None
    """Bounds attention logits as in Gemma 2: cap * tanh(logits / cap). None for no bound."""
    logits_softcap: float | None = None
    """Bounds the logits over the vocabulary likewise."""
    logits_scale: float | None = None
    """What the logits over the vocabulary are multiplied by; None for T5's 1 / sqrt(embed_dim) with
    `tied_logits`, else 1."""
    embedding_scale: float = 1.0
    """What embeddings of tokens are multiplied by, sqrt(embed_dim) in Gemma."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values."""
    out_bias: bool = False
    """Add a bias to the output of attention."""
    mlp_bias: bool = False
    """Add biases in feed-forward layers."""
    qk_norm: bool = False
    """Normalise each head of queries and keys, as in Qwen 3 and Gemma 3."""
    norm: str = "rms"
    """'rms'; 'rms_plus_one', whose scale is stored less 1, as in Gemma; or 'layer', which also
    subtracts the mean and adds a bias."""
    norm_epsilon: float = 1e-6
    """Added to variances for stability."""
    post_norms: bool = False
    """Normalise the output of attention and feed-forward layers as well, as in Gemma 2 and 3."""
    sliding_window: int | None = None
    """Layers see only keys at a distance below this, in tokens: backwards under causal attention,
    in both directions where a canvas is bidirectional. None for no window."""
    sliding_period: int | None = None
    """Every layer whose number, counted from 1, is a multiple of this sees everything in spite of
    `sliding_window`: 2 in Gemma 2, 6 in Gemma 3. None for none."""
    extra_tokens: int = 0
    """Tokens from `vocab_size` on that canvases may have and no text, such as noise's mask token:
    they have an embedding, and no logits, so that they are never predicted."""
    self_conditioning: bool = False
    """Add to a canvas what a small feed-forward network, at first 0, makes of the pass before: of
    the mean embedding under the distributions that it predicted (Chen et al., arXiv 2208.04202)."""
    low_rank: LowRank | None = None
    """Adapts chosen projections and freezes all else (LoRA); None to train everything."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        if isinstance(scaling := self.rope_scaling, Mapping):
            known = [field.name for field in dataclasses.fields(RopeScaling)]
            for name in scaling:
                check_known(name, known, "rope_scaling")
            if not {"kind", "factor"} <= set(scaling):
                raise ValueError(f"rope_scaling = {dict(scaling)}; expected a kind and a factor.")
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))
        for name in (
            "vocab_size",
            "embed_dim",
            "num_heads",
            "num_layers",
            "head_dim",
            "mlp_dim",
            "attention_block_logits",
            "num_kv_heads",
            "max_positions",
            "sliding_window",
            "sliding_period",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value}; expected at least 1.")
        if self.extra_tokens < 0:
            raise ValueError(f"extra_tokens = {self.extra_tokens}; expected at least 0.")
        for name in ("relative_buckets", "decoder_buckets"):
            if getattr(self, name) < 4 or getattr(self, name) % 2:
                raise ValueError(
                    f"{name.replace('decoder_', 'decoder_relative_')} = {getattr(self, name)}; "
                    "expected an even number of at least 4: half for each direction."
                )
        check_known(self.remat, REMAT_POLICIES, "remat")
        check_known(self.attention_kernel, ATTENTION_KERNELS, "attention_kernel")
        check_known(self.positions, POSITIONS, "positions")
        check_known(self.norm, NORMS, "norm")
        for activation in self.mlp_activations:
            if activation not in ("linear", "gelu_exact") and not hasattr(jax.nn, activation):
                raise ValueError(
                    f"mlp_activations has {activation!r}; expected 'linear', 'gelu_exact' or the "
                    "name of a function in jax.nn, such as 'gelu'."
                )
        self._check_together()

    def _check_together(self) -> None:
        """Refuses settings that contradict each other, or that nothing would read."""
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}."
            )
        if self.self_conditioning and self.low_rank is not None:
            raise ValueError(
                "self_conditioning = True with low_rank, which would freeze its network at 0; set "
                "self_conditioning = False, or low_rank = None."
            )
        rotary = self.positions == "rotary"
        for name, needed, given in (
            ("max_positions", "positions = 'learned'", self.positions == "learned"),
            ("rope_local_theta", "positions = 'rotary'", rotary),
            ("rope_local_theta", "a sliding_window", self.sliding_window is not None),
            ("rope_scaling", "positions = 'rotary'", rotary),
            ("sliding_period", "a sliding_window", self.sliding_window is not None),
        ):
            if getattr(self, name) is not None and not given:
                raise ValueError(f"{name} = {getattr(self, name)} needs {needed}.")
        if self.positions == "learned" and self.max_positions is None:
            raise ValueError("positions = 'learned' needs max_positions, the longest text.")
        if self.relative_bias_per_layer and self.positions != "relative_bias":
            raise ValueError(
                "relative_bias_per_layer = True needs positions = 'relative_bias', not "
                f"{self.positions!r}."
            )
        if rotary and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary positions need an even one.")
        for name in (
            "attention_scale",
            "attention_softcap",
            "logits_softcap",
            "logits_scale",
            "embedding_scale",
            "norm_epsilon",
            "rope_theta",
            "rope_local_theta",
        ):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} = {value}; expected more than 0.")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def decoder_buckets(self) -> int:
        """Buckets of relative distances in the decoder."""
        return self.decoder_relative_buckets or self.relative_buckets
