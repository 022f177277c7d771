"""What begins fresh in a run from another network's checkpoint: what a setting adds, by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toy

from diffusion_t5x.checkpointing import conversion
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig
from diffusion_t5x.checkpointing.reading import CheckpointMismatchError, open_params
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.decoding.updates import EntropyBound
from diffusion_t5x.models import Model
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.objectives import BoundDenoising
from diffusion_t5x.objectives.corruption import MaskCorruption
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import INIT_SHAPES, abstract_train_state, named_leaves
from diffusion_t5x.training.initial_state import StartingPoint

ADDED = "token_embedder/extra_embedding"


def _masked():
    base = toy.model()
    noise = MaskCorruption(toy.VOCAB_SIZE, mask_id=toy.VOCAB_SIZE, antithetic=True)
    config = dataclasses.replace(base.module.config, extra_tokens=1)
    decoder = DiffusionDecoder(noise, num_steps=2, num_samples=2, update=EntropyBound())
    objective = BoundDenoising(noise)
    return Model(DecoderOnly(config), objective, decoder, toy.VOCABULARY, base.optimizer_def)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An AR run, and a masked one that starts from it, stopped once: directories and parameters."""
    ar, masked = (tmp_path_factory.mktemp(name) for name in ("ar", "masked"))
    base = named_leaves(toy.run(ar, 2, toy.model("autoregressive")).params)
    settings = {"restore": RestoreCheckpointConfig(str(ar))}
    first = toy.run(masked, None, _masked(), learning_rate=0.0, relative_steps=2, **settings)
    toy.run(masked, None, _masked(), relative_steps=4, **settings)
    return ar, masked, base, named_leaves(first.params)


@pytest.mark.slow
def test_only_what_the_setting_adds_begins_fresh_and_the_run_resumes(runs):
    _, masked, base, first = runs
    assert first.keys() - base.keys() == {ADDED}
    for name, values in base.items():
        np.testing.assert_array_equal(values, first[name], err_msg=name)
    assert first[ADDED].shape == (1, 16) and np.asarray(first[ADDED]).std() > 0.1
    stored = open_params(f"{masked}/checkpoint_6")
    assert not np.array_equal(stored[ADDED].read(), first[ADDED])  # it is trained
    lines = [json.loads(line) for line in (masked / "metrics.jsonl").read_text().splitlines()]
    [*_, last] = [line for line in lines if line["split"] == "train"]
    rates = [name for name in last if name.startswith("cross_entropy/rate_")]
    assert last["cross_entropy/by_rate"] == pytest.approx(np.mean([last[r] for r in rates]))


@pytest.mark.slow
def test_the_way_back_is_refused_and_so_are_formats_that_cannot_hold_it(runs, tmp_path):
    _, masked, _, _ = runs
    restore = RestoreCheckpointConfig(str(masked), params_only=True)
    with pytest.raises(CheckpointMismatchError, match=f"no {ADDED}.*(\n.*)*extra_tokens"):
        toy.run(tmp_path / "back", 3, toy.model(), restore=restore)
    with pytest.raises(ValueError, match=f"no network of T5's: {ADDED}"):
        conversion.convert(str(masked), str(tmp_path / "t5x"), layout="t5x:decoder_only")
    kept = conversion.convert(str(masked), f"{tmp_path}/ours", model=_masked(), dry_run=True)
    assert ADDED in kept.arrays


def _shapes(*names):
    return {name: jax.ShapeDtypeStruct((1, 2), np.float32) for name in names}


@pytest.mark.slow
def test_additions_are_known_by_their_names_and_no_other_parameter_begins_fresh(runs):
    checkpoint = f"{runs[0]}/checkpoint_2"
    state = abstract_train_state(toy.model("autoregressive"), PjitPartitioner(), INIT_SHAPES, {})
    start = StartingPoint(checkpoint, 2, 2, has_optimizer=True)

    def fit(**added):
        params = {**state.params, **added}
        return start.fit(dataclasses.replace(state, params=params))

    assert fit() == start
    gate = _shapes("kernel")
    begun = fit(self_conditioning=gate)
    assert (begun.begins, begun.has_optimizer) == (("self-conditioning",), False)
    both = fit(self_conditioning_gate=gate, added=_shapes("extra_embedding"))
    assert both.begins == ("embeddings of extra tokens", "self-conditioning")
    assert "fresh embeddings of extra tokens and self-conditioning" in str(both)
    for other in ("extra_embeddings", "conditioning", "my_self_conditioning"):
        with pytest.raises(CheckpointMismatchError, match=f"lacks {other}"):
            fit(**{other: gate, "self_conditioning": gate})
