"""What `benchmarks.accelerator` compiles and runs: functions, and the shapes of their arguments.

They are those of `models.Model`, without it, since it needs SeqIO.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.shapes import KEY, Shape, of_size
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.stopping import Unchanged
from diffusion_t5x.networks import bound_network
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.runtime.partitioning import standard_logical_axis_rules

Array = jax.Array
PREFIX, BLOCK, STEPS, CACHE = 32, 128, 10, "causal_prefix"
VOCABULARY, LARGE_VOCABULARY = 32_128, 262_144


SIZES = {name: of_size(name, VOCABULARY) for name in ("base", "large")}
SIZES["tiny"] = of_size("tiny", 512)
LENGTHS = {"decoding": 512, "long": 4096}  # Tokens of a text.
BATCHES = (1, 8)
# Texts, and tokens of each, of a training step.
TRAIN = {"tiny": (2, 64), "base": (64, 512), "large": (64, 512)}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, the shapes of its arguments, and what is known of its cost."""

    what: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float | None = None  # of one call
    steps: int | None = None  # tokens or denoising steps of one call

    def figures(self, seconds: float, peak: float | None) -> dict[str, float]:
        """Returns what follows from the time of a call, and the rate of a large product."""
        fields = {}
        if self.steps:
            fields["milliseconds_per_step"] = seconds * 1e3 / self.steps
        if self.flops:
            fields["tera_flops_per_second"] = self.flops / seconds / 1e12
            if peak:
                fields["share_of_product_rate"] = self.flops / seconds / peak
        return fields


@contextlib.contextmanager
def for_device(device: jax.Device) -> Iterator[NamedSharding]:
    """Makes a device the only one that functions are traced for, and yields its sharding."""
    mesh = Mesh(np.asarray([[device]]), ("data", "model"))
    rules = flax_partitioning.axis_rules(standard_logical_axis_rules())
    with jax.set_mesh(mesh), rules:
        yield NamedSharding(mesh, PartitionSpec())


def concrete(shapes: Any) -> Any:
    """Returns random arguments, the same everywhere: small parameters, and tokens of a text."""
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> np.ndarray:
        if np.issubdtype(x.dtype, np.integer):
            return rng.integers(3, 500, x.shape, x.dtype)
        values = rng.standard_normal(x.shape, np.float32)
        name = getattr(path[-1], "key", None) if path else None
        if name == "kernel":
            values /= np.sqrt(x.shape[-2], dtype=np.float32)
        elif name == "scale":
            values = 1 + 0.1 * values
        elif name != "embedding":
            values *= 0.1
        return np.ones(x.shape, x.dtype) if name == "weights" else values.astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def network(size: Shape, **config: Any) -> DecoderOnly:
    """Returns the network of a size, its layers scanned."""
    settings = {"dtype": "bfloat16", "scan_layers": True, **config}
    return DecoderOnly(TransformerConfig(**dataclasses.asdict(size), **settings))


def initial(module: DecoderOnly) -> Any:
    """Returns the shapes of a network's parameters."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(lambda x: module.init(KEY, x, x, "causal")["params"], tokens)


def _tokens(batch_size: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, length), jnp.int32)


def _decode(module: DecoderOnly, decoder: Any, pattern: str, length: int) -> Callable[..., Array]:
    """Returns the decoding of prefixes, `(params, prefixes) -> [batch, length]`."""

    def decode(params: Any, prefixes: Array) -> Array:
        batch = {"encoder_input_tokens": prefixes}
        bound = bound_network.bind(module, params, batch, pattern, many_passes=True)
        return decoder.decode(bound, length, KEY).tokens[:, -1]

    return decode


def decoding(name: str, length: int, batch_size: int) -> Iterator[Program]:
    """Yields a batch's decoding by each method, AR first."""
    size = SIZES[name]
    corruption = UniformCorruption(size.vocab_size)
    ten = {"num_steps": STEPS}
    fast = {**ten, "num_samples": 8, "halve_every": 2, "trim_multiple": 8, "stop": Unchanged()}
    blocks = {**ten, "num_samples": 1, "prefix_cache": True, "block_length": BLOCK}
    module = network(size)
    yield Program(
        f"AR, {name}, {batch_size} x {length} tokens",
        _decode(module, AutoregressiveDecoder(eos_id=-1), "causal", length),
        (initial(module), _tokens(batch_size, PREFIX)),
        steps=length,
    )
    for kernel in ("xla", "fused"):
        module = network(size, attention_kernel=kernel)
        for what, pattern, settings in (
            ("ten steps x 1", "bidirectional", {**ten, "num_samples": 1}),
            ("ten steps x 8", "bidirectional", {**ten, "num_samples": 8}),
            ("decoders/fast.gin", "bidirectional", fast),
            ("blocks of 128", CACHE, blocks),
        ):
            if kernel == "fused" and what != "ten steps x 1":
                continue
            turns = STEPS * (length // BLOCK if settings is blocks else 1)
            yield Program(
                f"{what}, {kernel}, {name}, {batch_size} x {length} tokens",
                _decode(module, DiffusionDecoder(corruption, **settings), pattern, length),
                (initial(module), _tokens(batch_size, PREFIX)),
                steps=None if settings is fast else turns,
            )


def _loss(
    module: DecoderOnly, objective: str
) -> tuple[Callable[[Any, Array, Array, Array], Array], int]:
    """Returns the loss of `(params, prefixes, targets, weights)`, and the passes that it takes."""
    if objective == "autoregressive":
        loss, passes = NextToken(), 1
    else:
        loss = StepUnrolledDenoising(UniformCorruption(module.config.vocab_size))
        passes = 2

    def run(params: Any, prefixes: Array, targets: Array, weights: Array) -> Array:
        batch = {"encoder_input_tokens": prefixes, "decoder_input_tokens": targets}
        bound = bound_network.bind(module, params, batch, loss.attention_pattern)
        total, count, _ = loss.loss(bound, targets, weights, KEY)
        return total / count

    return run, passes


def model_flops(size: Shape, batch_size: int, length: int, passes: int) -> float:
    """Counts the operations of loss and gradient: products with weights, and of attention.

    Attention counts all pairs of positions, masked or not.
    """
    width = size.num_heads * size.head_dim
    layer = 4 * size.embed_dim * width + 3 * size.embed_dim * size.mlp_dim
    weights = size.num_layers * layer + size.vocab_size * size.embed_dim
    per_token = 2 * weights + 4 * size.num_layers * length * width
    return 3.0 * passes * batch_size * length * per_token


def gradient(name: str, objective: str, *, fused: bool) -> Program:
    """Returns the loss and gradient of a size's texts, the first token of which is a prefix."""
    return _gradient(name, SIZES[name], TRAIN[name], objective, fused)


def large_vocabulary(name: str, *, fused: bool) -> Program:
    """Returns loss and gradient of fewer texts at a large vocabulary, AR."""
    batch_size, length = TRAIN[name]
    size = dataclasses.replace(SIZES[name], vocab_size=LARGE_VOCABULARY)
    texts = max(1, batch_size // 4), length
    return _gradient(f"{name}, {LARGE_VOCABULARY} tokens", size, texts, "autoregressive", fused)


def _gradient(
    name: str, size: Shape, texts: tuple[int, int], objective: str, fused: bool
) -> Program:
    batch_size, length = texts
    kernel = "fused" if fused else "xla"
    module = network(size, attention_kernel=kernel)
    loss, passes = _loss(module, objective)
    targets = _tokens(batch_size, length - 1)
    weights = jax.ShapeDtypeStruct(targets.shape, jnp.float32)
    return Program(
        f"loss and gradient, {objective}, {kernel}, {name}, {batch_size} x {length}",
        jax.value_and_grad(loss),
        (initial(module), _tokens(batch_size, 1), targets, weights),
        flops=model_flops(size, batch_size, length, passes),
    )


def numerics(name: str, dtype: str) -> Iterator[Program]:
    """Yields logits of texts, greedy tokens, and tokens of a diffusion decoder, in one type."""
    size = dataclasses.replace(SIZES[name], num_layers=min(4, SIZES[name].num_layers))
    module = network(size, dtype=dtype)
    arguments = initial(module), _tokens(2, PREFIX)
    tokens = 64

    def logits(params: Any, prefixes: Array) -> Array:
        batch = {"encoder_input_tokens": prefixes}
        bound = bound_network.bind(module, params, batch, "bidirectional")
        return bound.logits(bound.forward(prefixes, None))

    yield Program(f"logits, {dtype}, {name}", logits, arguments)
    decoder = AutoregressiveDecoder(eos_id=-1)
    greedy = _decode(module, decoder, "causal", tokens)
    yield Program(f"AR, greedy, {dtype}, {name}", greedy, arguments, steps=tokens)
    sampler = DiffusionDecoder(UniformCorruption(size.vocab_size), num_samples=2)
    samples = _decode(module, sampler, "bidirectional", tokens)
    yield Program(f"ten steps x 2, {dtype}, {name}", samples, arguments, steps=STEPS)
