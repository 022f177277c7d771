"""Small networks whose parameters are drawn with NumPy, since compiling `init` takes seconds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder

CONFIG = TransformerConfig(
    vocab_size=17, embed_dim=16, num_heads=2, num_layers=2, head_dim=8, mlp_dim=24
)
# Halves the time to compile; at these sizes nothing runs longer for it.
QUICK = {"xla_backend_optimization_level": 0}
NETWORKS = (DecoderOnly, EncoderDecoder)


@functools.lru_cache
def make(network_class, **overrides):
    """A network, and parameters that depend on nothing but their names and shapes."""
    network = network_class(dataclasses.replace(CONFIG, **overrides))
    tokens = np.ones((1, 2), np.int32)
    init = functools.partial(network.init, attention_pattern="causal")
    shapes = jax.eval_shape(init, jax.random.PRNGKey(0), tokens, tokens)["params"]
    rng = np.random.default_rng(0)

    def draw(path, shape):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        std = 0.05 if path[-2].key == "query" else 0.25
        return jnp.asarray(rng.normal(mean, std, shape.shape), jnp.float32)

    return network, jax.tree_util.tree_map_with_path(draw, shapes)


def run(network, params, method, **kwargs):
    """The result of `method(module)`, compiled."""

    def apply(params):
        return network.apply({"params": params}, method=method, **kwargs)

    return jax.jit(apply, compiler_options=QUICK)(params)


def read(network, params, prefix, target, pattern, prefix_segments=None, target_segments=None):
    """Hidden states of the target, without dropout."""

    def encode_and_decode(module):
        context = module.encode(prefix, prefix_segments, deterministic=True)
        return module.decode(context, target, pattern, target_segments, deterministic=True)

    return network.apply({"params": params}, method=encode_and_decode)


hidden = jax.jit(read, static_argnums=(0, 4), compiler_options=QUICK)
