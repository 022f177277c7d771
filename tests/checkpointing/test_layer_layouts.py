"""A checkpoint of stacked layers is one of single layers, and the other way round, to the bit."""

import contextlib

import jax
import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing import reading
from diffusion_t5x.checkpointing.checkpoints import Checkpointer, SaveCheckpointConfig
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import abstract_train_state, named_leaves
from diffusion_t5x.training import optimizers

LAYERS = 3
SHAPES = {"encoder_input_tokens": (1, 4), "decoder_input_tokens": (1, 4)}
OPTIMIZERS = {
    "adamw": optimizers.adamw,
    # Of each layer the kernels are factored, and the scales of norms are not.
    "adafactor": lambda: optimizers.adafactor(min_dim_size_to_factor=8, momentum=0.9),
}


def _abstract(optimizer, **config):
    config = {"num_layers": LAYERS, **config}
    model = toy.model("autoregressive", optimizer=OPTIMIZERS[optimizer](), **config)
    return abstract_train_state(model, PjitPartitioner(), SHAPES, {})


def _draw(abstract):
    """A state of numbers by name; what Adafactor does not need is 0, as it leaves it."""

    def values(name, leaf):
        if leaf.dtype == np.int32:
            return np.full(leaf.shape, 7, np.int32)
        if leaf.shape == (1,):
            return np.zeros(1, np.float32)
        rng = np.random.default_rng(sum(name.encode()))
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    drawn = {name: values(name, leaf) for name, leaf in named_leaves(abstract).items()}
    return jax.tree.unflatten(jax.tree.structure(abstract), list(drawn.values()))


def _by_layer(state):
    """Leaves of single layers; by hand, from their names."""
    leaves = {}
    for name, value in named_leaves(state).items():
        if "/layers/" not in name:
            leaves[name] = np.asarray(value)
            continue
        for number in range(LAYERS):
            own = value if value.shape == (1,) else value[number]
            leaves[name.replace("/layers/", f"/layers_{number}/")] = np.asarray(own)
    return leaves


def _save(directory, state):
    config = SaveCheckpointConfig(save_dataset=False)
    with contextlib.closing(Checkpointer(str(directory), config)) as checkpointer:
        checkpointer.save(jax.tree.map(jax.numpy.asarray, state))
    return f"{directory}/checkpoint_7"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scanned", [False, True])
def test_parameters_and_optimizer_state_are_restored_in_the_other_layout(
    optimizer, scanned, tmp_path
):
    here = _abstract(optimizer, scan_layers=scanned)
    there = _abstract(optimizer, scan_layers=not scanned)
    state = _draw(here)
    restored = reading.restore_train_state(_save(tmp_path, state), there)
    assert jax.tree.structure(restored) == jax.tree.structure(there)
    for name, leaf in named_leaves(restored).items():
        wanted = named_leaves(there)[name]
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (
            wanted.shape, wanted.dtype, wanted.sharding), name  # fmt: skip
    ours, theirs = _by_layer(state), _by_layer(restored)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    # No two arrays share memory, which a step that is given the state may take.
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(restored)]
    assert len(set(buffers)) == len(buffers)


def test_a_checkpoint_of_the_other_layout_that_does_not_fit_is_refused_by_names(tmp_path):
    here = _abstract("adamw", scan_layers=False)
    path = _save(tmp_path, _draw(here))
    for settings, message in (
        ({"num_layers": 4}, r"mlp/wo/kernel: the checkpoint has \[3, 16, 16\], the model \[4, 16"),
        ({"mlp_dim": 24}, r"mlp/wo/kernel: the checkpoint has \[3, 16, 16\], the model \[3, 24"),
        ({"qkv_bias": True}, r"lacks decoder/layers/self_attention/key/bias: float32\[3, 16\]"),
    ):
        there = _abstract("adamw", scan_layers=True, **settings)
        with pytest.raises(reading.CheckpointMismatchError, match=message):
            reading.check_params(path, there.params)
    # An optimiser state that cannot be carried over says how to go on with it.
    there = _abstract("adafactor", scan_layers=True)
    with pytest.raises(reading.CheckpointMismatchError, match="scan_layers = False is the layout"):
        reading.check_item(path, "optimizer", reading.optimizer_item(there))


def test_adafactor_learns_the_same_from_stacked_layers_as_from_single_ones():
    optimizer = OPTIMIZERS["adafactor"]()
    rng = np.random.default_rng(0)
    # Layers of very different size, which one scale for all of them would mix.
    sizes = 10.0 ** np.arange(LAYERS)
    shapes = {"wo": (8, 16), "scale": (16,)}  # one factored, one not
    params, grads = (
        {n: (rng.normal(size=(LAYERS, *s)).T * sizes).T.astype("f4") for n, s in shapes.items()}
        for _ in range(2)
    )

    def update(params, grads):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
        return updates

    ours = jax.jit(update)({"layers": params}, {"layers": grads})["layers"]
    for number in range(LAYERS):
        own = [jax.tree.map(lambda x, n=number: x[n], tree) for tree in (params, grads)]
        theirs = jax.jit(update)(*own)
        for name in shapes:
            np.testing.assert_allclose(ours[name][number], theirs[name], rtol=1e-5)


@pytest.mark.slow  # compiles two training steps; its parts are tested above
def test_a_run_goes_on_in_the_other_layout(tmp_path):
    models = [toy.model("autoregressive", num_layers=2, scan_layers=x) for x in (False, True)]
    toy.run(tmp_path / "a", 2, models[0])
    toy.run(tmp_path / "b", 2, models[0])
    kept, moved = toy.run(tmp_path / "a", 4, models[0]), toy.run(tmp_path / "b", 4, models[1])
    for number in range(2):
        one = kept.params["decoder"][f"layers_{number}"]
        other = jax.tree.map(lambda x, n=number: x[n], moved.params["decoder"]["layers"])
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), one, other
        )
