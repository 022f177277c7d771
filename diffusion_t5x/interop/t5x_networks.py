"""Maps the parameters of T5X's example networks to ours, and back.

| network | architecture |
|---|---|
| `t5` | `t5x.examples.t5`: encoder-decoder, one position-bias table per stack |
| `scalable_t5` | `t5x.examples.scalable_t5`: the same, one table per layer, scanned layers |
| `decoder_only` | `t5x.examples.decoder_only`: one causal stack |
| `diffusion_t5x` | ours, also when T5X's trainer trained it |

T5X's decoders use all buckets of relative positions for tokens before the query; ours use half of
them. A table of T5X becomes the backward half of one of twice the size, whose forward half starts
as the bias of distance 0, which is what T5X reads there. So a causal network computes the same
logits, and bidirectional training from there keeps the meaning of its buckets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from diffusion_t5x.interop.stored_arrays import StoredArray, stack, unstack
from diffusion_t5x.names import check_known

OURS = "diffusion_t5x"
NETWORKS = ("t5", "scalable_t5", "decoder_only", OURS)
Params = dict[str, StoredArray]

# (pattern, replacement)
_TO_OURS = (
    (r"^decoder/token_embedder/", "token_embedder/"),
    (r"^decoder/logits_dense/kernel$", "token_embedder/logits_kernel"),
    (r"^(encoder|decoder)/\1_norm/", r"\1/final_layer_norm/"),
    (r"^(encoder/layers_\d+)/attention/", r"\1/self_attention/"),
    (r"^(encoder/layers_\d+)/pre_attention_layer_norm/", r"\1/pre_self_attention_layer_norm/"),
    (r"/mlp/wi/", "/mlp/wi_0/"),
)
_TO_THEIRS = (
    (r"^(encoder|decoder)/final_layer_norm/", r"\1/\1_norm/"),
    (r"^(encoder/layers_\d+)/self_attention/", r"\1/attention/"),
    (r"^(encoder/layers_\d+)/pre_self_attention_layer_norm/", r"\1/pre_attention_layer_norm/"),
    (r"^token_embedder/logits_kernel$", "decoder/logits_dense/kernel"),
)
_LAYER = re.compile(r"^(encoder|decoder)/layers_(\d+)/(.*)$")
_TABLE = re.compile(r"^decoder/(layers_\d+/)?relpos_bias/rel_embedding$")
_INPUT_KERNEL = re.compile(r"attention/(query|key|value)/kernel$")
_OUTPUT_KERNEL = re.compile(r"attention/out/kernel$")


def network_of(names: Iterable[str]) -> str:
    """Returns which of `NETWORKS` has parameters of these names; raises ValueError if none has."""
    names = set(names)
    if "decoder/final_layer_norm/scale" in names:
        return OURS
    if "decoder/decoder_norm/scale" in names:
        if "decoder/token_embedder/embedding" in names:
            return "decoder_only"
        shared = "decoder/relpos_bias/rel_embedding" in names
        return "t5" if shared else "scalable_t5"
    raise ValueError(
        f"parameters such as {', '.join(sorted(names)[:3])} belong to no known network. "
        f"Known: {', '.join(NETWORKS)}."
    )


def begins_with_zero(names: Iterable[str]) -> bool:
    """Returns whether a network needs `TransformerConfig.start_token`, which no shape shows."""
    return network_of(names) == "decoder_only"


def check_is_t5(params: Mapping[str, StoredArray]) -> None:
    """Refuses our parameters of networks of other families than T5's, whose settings no name tells.

    Raises:
      ValueError: If T5 has no such parameter, or no table of distances is there.
    """
    pattern = (
        r"/bias$|(position|extra)_embedding$|self_conditioning|(query|key)_norm/|/post_\w+_norm/"
    )
    other = [name for name in params if re.search(pattern, name)]
    for name, array in params.items():
        if name.endswith("/key/kernel"):
            query = params[name.replace("/key/", "/query/")].shape
            other += [name] if array.shape != query else []
    if not any(name.endswith("rel_embedding") for name in params):
        other.append("a decoder without relpos_bias/rel_embedding")
    if other:
        raise ValueError(
            f"this is no network of T5's: {other[0]}. T5X's networks cannot hold it; in our own "
            "formats it is written with the gin files of its model."
        )


def hint(misfits: Iterable[str]) -> str:
    """Returns hints on the settings that could resolve the lines of `reading.compare`, or ''."""
    text = "\n".join(misfits)
    hints = {
        r"decoder/.*rel_embedding.*, 64\], the model .*, 32\]": "decoder_relative_buckets = 64",
        r"lacks decoder/relpos_bias/": "relative_bias_per_layer = True",
        r"lacks decoder/layers\w*/relpos_bias/": "relative_bias_per_layer = False",
        r"lacks token_embedder/logits_kernel": "tied_logits = True",
        r"model has no token_embedder/logits_kernel": "tied_logits = False",
        r"lacks .*/low_rank_a": "low_rank = None, which is the default",
        r"model has no .*/low_rank_a": "low_rank, which models/low_rank.gin sets",
        r"lacks .*extra_embedding": "extra_tokens = 0, which is the default",
        r"model has no .*extra_embedding": "extra_tokens, which files of gin/noise/ set",
    }
    settings = [setting for pattern, setting in hints.items() if re.search(pattern, text)]
    return "".join(f"\nIt may need TransformerConfig.{setting}." for setting in settings)


def to_ours(params: Mapping[str, StoredArray]) -> Params:
    """Returns the parameters of any known network under our names, one per layer.

    Raises:
      ValueError: If the network is unknown.
    """
    network = network_of(params)
    ours: Params = {}
    for name, stored in params.items():
        for layer_name, array in _layers(name, stored):
            if network == OURS:
                ours[layer_name] = array
            else:
                our_name = _rename(layer_name, _TO_OURS)
                ours[our_name] = _to_our_shape(our_name, array)
    return ours


def _rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _layers(name: str, stored: StoredArray) -> list[tuple[str, StoredArray]]:
    """Splits a parameter of scanned layers into one per layer; returns any other unchanged."""
    for pattern, axis in ((r"^(encoder|decoder)/layers/", 0), (r"^(encoder|decoder)/\1/", 1)):
        if match := re.match(pattern, name):
            rest = name[match.end() :]
            layers = enumerate(unstack(stored, axis))
            return [(f"{match.group(1)}/layers_{i}/{rest}", layer) for i, layer in layers]
    return [(name, stored)]


def _to_our_shape(name: str, array: StoredArray) -> StoredArray:
    if _TABLE.match(name):
        heads, buckets = array.shape
        return array.derive(
            (heads, 2 * buckets),
            lambda table: np.concatenate([table, np.repeat(table[:, :1], buckets, 1)], axis=1),
        )
    if len(array.shape) == 3 and _INPUT_KERNEL.search(name):
        return array.reshape(array.shape[0], array.shape[1] * array.shape[2])
    if len(array.shape) == 3 and _OUTPUT_KERNEL.search(name):
        return array.reshape(array.shape[0] * array.shape[1], array.shape[2])
    return array


def scan(params: Mapping[str, StoredArray], axis: int = 0, prefix: str = "layers") -> Params:
    """Stacks the parameters of layers, under our names or T5X's, along `axis` of scanned layers.

    `prefix` replaces 'layers_{n}' in names; '' stands for the name of the stack, as in T5X.
    """
    scanned: Params = {}
    groups: dict[str, dict[int, StoredArray]] = {}
    for name, array in params.items():
        if match := _LAYER.match(name):
            side, number, rest = match.groups()
            group = f"{side}/{prefix or side}/{rest}"
            groups.setdefault(group, {})[int(number)] = array
        else:
            scanned[name] = array
    for name, layers in groups.items():
        scanned[name] = stack([layers[number] for number in sorted(layers)], axis)
    return scanned


def is_scanned(names: Iterable[str]) -> bool:
    """Returns whether these are our names of a network with scanned layers."""
    return any(re.match(r"^(encoder|decoder)/layers/", name) for name in names)


def from_ours(params: Mapping[str, StoredArray], network: str) -> Params:
    """Returns our parameters, one per layer, under the names and in the shapes of a T5X network.

    Raises:
      ValueError: If the network is unknown or cannot hold them.
    """
    check_known(network, NETWORKS[:-1], "network")
    has_encoder = "encoder/final_layer_norm/scale" in params
    if has_encoder == (network == "decoder_only"):
        have = "an encoder-decoder" if has_encoder else "a decoder-only network"
        raise ValueError(f"network {network!r} cannot hold the parameters of {have}.")
    gated = any(name.endswith("/mlp/wi_1/kernel") for name in params)
    params = _share_tables(params, shared=network != "scalable_t5")
    theirs: Params = {}
    for name, array in params.items():
        array = _narrow(array) if _TABLE.match(name) else array  # noqa: PLW2901
        if network == "scalable_t5":
            array = _split_heads(name, array, params)  # noqa: PLW2901
        theirs[_their_name(name, network, gated)] = array
    return scan(theirs, axis=1, prefix="") if network == "scalable_t5" else theirs


def _their_name(name: str, network: str, gated: bool) -> str:
    name = _rename(name, _TO_THEIRS)
    if network == "decoder_only":
        name = re.sub(r"^token_embedder/", "decoder/token_embedder/", name)
    return name if gated else name.replace("/mlp/wi_0/", "/mlp/wi/")


def _share_tables(params: Mapping[str, StoredArray], *, shared: bool) -> Params:
    """Converts position-bias tables to one per stack if `shared`, else to one per layer."""
    result: Params = {}
    for name, array in params.items():
        side, _, rest = name.partition("/")
        match = re.match(r"(layers_(\d+)/)?relpos_bias/", rest)
        if match is None or bool(match.group(1)) != shared:
            result[name] = array
        elif shared:
            first = params[f"{side}/layers_0/relpos_bias/rel_embedding"]
            if not np.array_equal(first.read(), array.read()):
                raise ValueError(
                    f"{name} differs from that of layer 0, but this network has one position-bias "
                    "table for all layers; 'scalable_t5' has one for each."
                )
            result[f"{side}/relpos_bias/rel_embedding"] = first
        else:
            numbers = {m.group(2) for n in params if (m := _LAYER.match(n)) and m.group(1) == side}
            for number in sorted(numbers, key=int):
                result[f"{side}/layers_{number}/relpos_bias/rel_embedding"] = array
    return result


def _narrow(table: StoredArray) -> StoredArray:
    """Returns the backward half of a decoder's table, all that T5X's networks have."""
    heads, buckets = table.shape
    if buckets != 64:
        raise ValueError(
            f"{table.source} has {buckets} buckets, {buckets // 2} of them backward; T5X's "
            "decoders have 32 backward: TransformerConfig.decoder_relative_buckets = 64."
        )
    return table.derive((heads, buckets // 2), lambda x: x[:, : buckets // 2])


def _split_heads(name: str, array: StoredArray, params: Mapping[str, StoredArray]) -> StoredArray:
    """Splits `[embed, heads * head_dim]` into `[embed, heads, head_dim]`, and outputs likewise."""
    heads = next(p.shape[0] for n, p in params.items() if n.endswith("relpos_bias/rel_embedding"))
    if _INPUT_KERNEL.search(name):
        return array.reshape(array.shape[0], heads, array.shape[1] // heads)
    if _OUTPUT_KERNEL.search(name):
        return array.reshape(heads, array.shape[0] // heads, array.shape[1])
    return array
