"""What is not finite stops a run or is skipped, its batch is kept, and resuming changes nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy

from diffusion_t5x import models
from diffusion_t5x.checkpointing.checkpoints import list_checkpoints
from diffusion_t5x.data import datasets
from diffusion_t5x.training import nonfinite
from diffusion_t5x.training.metric_logs import read_metrics
from diffusion_t5x.training.nonfinite import NonFiniteSteps
from diffusion_t5x.training.train_step import Health, NonFiniteError


def _batches(number):
    """The first batches of a toy run."""
    iterator = datasets.get_training_iterator(
        toy.dataset_cfg(), toy.model().FEATURE_CONVERTER_CLS, seed=0
    )
    return [next(iterator) for _ in range(number)]


def _rate(*bad):
    """A learning rate that is not a number at the updates that lead to these steps."""
    return lambda step: jnp.where(jnp.isin(step + 1, jnp.array(bad)), jnp.nan, 1e-2)


def _run(directory, steps, *bad, allowed=2, **kwargs):
    trainer = {"max_skipped_updates": allowed, "learning_rate_fn": _rate(*bad)}
    return toy.run(directory, steps, trainer=trainer, period=1, **kwargs)


def _clocks(directory):
    """What a clock decided of the last line."""
    names = "seconds", "steps_per_second", "examples_per_second"
    return {name: read_metrics(str(directory))[-1][name] for name in names}


def _arrays(directory, step):
    path = (directory / f"checkpoint_{step}").absolute()
    trees = [ocp.StandardCheckpointer().restore(path / item) for item in ("params", "optimizer")]
    return trees[0], trees[1]["opt_state"], int(trees[1]["step"])


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_skipped_update_changes_the_step_alone_and_a_restart_ends_with_the_same_bits(tmp_path):
    straight = _run(tmp_path / "straight", 6, 3)
    before, after = (_arrays(tmp_path / "straight", step) for step in (2, 3))
    _same(before[:2], after[:2])
    assert (before[2], after[2]) == (2, 3)
    assert not np.array_equal(*(
        jax.tree.leaves(_arrays(tmp_path / "straight", step)[0])[0] for step in (3, 4)
    ))  # fmt: skip
    _run(tmp_path / "stopped", 3, 3)
    _same(straight, _run(tmp_path / "stopped", 6, 3))
    for name in ("straight", "stopped"):
        lines = [line for line in read_metrics(str(tmp_path / name)) if line["split"] == "train"]
        told = {line["step"]: line["skipped_updates"] for line in lines}
        assert sum(told.values()) == 1 and told[6] == 0
        skipped = (tmp_path / name / "nonfinite" / "skipped.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in skipped] == [3]
    # The average of a line's metrics is that of the steps that were not skipped.
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


@pytest.mark.slow  # that an update is skipped or applied whole is what the test above compares
def test_where_nothing_goes_wrong_skipping_changes_no_number(tmp_path):
    _same(_run(tmp_path / "on", 3), _run(tmp_path / "off", 3, allowed=0))
    assert not (tmp_path / "on" / "nonfinite").exists()


class _Poisoned(models.Model):
    """Its loss is not a number for one batch."""

    def loss_fn(self, params, batch, *args):
        loss, metrics = super().loss_fn(params, batch, *args)
        poison = jnp.all(batch["decoder_target_tokens"] == _batches(2)[1]["decoder_target_tokens"])
        return loss * jnp.where(poison, jnp.nan, 1.0), metrics


def _poisoned():
    model = toy.model()
    return _Poisoned(
        model.module, model.objective, model.decoder, toy.VOCABULARY, model.optimizer_def,
        "NUM_REAL_TARGET_TOKENS",
    )  # fmt: skip


def test_the_batch_of_the_step_that_stopped_a_run_is_kept(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is nan .*step_2\.npz") as error:
        toy.run(tmp_path, 6, _poisoned(), period=100)
    assert "max_skipped_updates" not in str(error.value)
    kept = np.load(tmp_path / "nonfinite" / "step_2.npz")
    batch = _batches(2)[1]
    for name, value in batch.items():
        np.testing.assert_array_equal(kept[name], value)
    assert (kept["step"], kept["seed"]) == (2, 0)
    assert np.isnan(kept["loss"])
    assert "token_embedder/embedding" in kept["leaves"]
    assert list(tmp_path.glob("nonfinite/*")) == [tmp_path / "nonfinite" / "step_2.npz"]


@pytest.mark.slow
def test_more_in_a_row_than_allowed_stop_the_run_also_over_a_restart(tmp_path):
    bad = range(3, 20)
    with pytest.raises(NonFiniteError, match=r"step 5: .* That is 3 in a row"):
        _run(tmp_path, 20, *bad)
    assert list_checkpoints(str(tmp_path))[-1][0] == 4
    # Nothing was averaged over for steps 3 and 4, and no NaN is written for it.
    assert read_metrics(str(tmp_path))[-1] == {
        "step": 4, "split": "train", "skipped_updates": 2, **_clocks(tmp_path),
    }  # fmt: skip
    # Two were skipped before the last checkpoint; a restart does not allow two more.
    with pytest.raises(NonFiniteError, match=r"step 5: .* That is 3 in a row"):
        _run(tmp_path, 20, *bad)


@dataclasses.dataclass
class _Fake:
    """A run as far as `look_at` knows it."""

    directory: object
    allowed: int = 100

    def open(self, restored_step=0):
        return NonFiniteSteps(str(self.directory), restored_step, ["a", "b"], self.allowed, 7)

    @staticmethod
    def health(step, loss=1.0, grads=(1.0, 1.0), updates=(1.0, 1.0)):
        return Health(step, np.float32(loss), np.array(grads), np.array(updates))


BATCH = {"decoder_target_tokens": np.ones((2, 3), np.int32)}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"loss": np.inf}, "none"), ({"grads": (1, np.nan)}, "b"), ({"updates": (np.inf, 1)}, "a")],
)
def test_each_kind_of_number_is_looked_at_and_the_leaf_named(tmp_path, wrong, named):
    steps = _Fake(tmp_path, allowed=0).open()
    steps.look_at(_Fake.health(1), BATCH)
    with pytest.raises(NonFiniteError, match=rf"step 2: .* of 2 leaves: {named}\."):
        steps.look_at(_Fake.health(2, **wrong), BATCH)


def test_only_so_many_batches_are_kept_and_that_of_the_last_step_always(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "MAX_DUMPS", 2)
    fake = _Fake(tmp_path, allowed=4)
    steps = fake.open()
    for step in range(1, 5):
        steps.look_at(fake.health(step, loss=np.nan), BATCH)
    with pytest.raises(NonFiniteError):
        steps.look_at(fake.health(5, loss=np.nan), BATCH)
    kept = sorted(path.name for path in (tmp_path / "nonfinite").glob("*.npz"))
    assert kept == ["step_1.npz", "step_2.npz", "step_5.npz"]


def test_what_was_skipped_beyond_the_checkpoint_is_forgotten_on_a_restart(tmp_path):
    fake = _Fake(tmp_path)
    steps = fake.open()
    for step in (2, 4, 5):
        steps.look_at(fake.health(step, loss=np.nan), BATCH)
    assert (steps.skipped_since(0), steps.skipped_since(4)) == (3, 1)
    assert fake.open(4).skipped_since(0) == 2
    assert fake.open(5).skipped_since(0) == 2


def test_each_of_several_processes_keeps_its_own_rows_and_one_writes_the_list(
    tmp_path, monkeypatch, capsys
):
    fake = _Fake(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        steps = fake.open()
        steps.look_at(fake.health(3, loss=np.nan), {"rows": np.full(2, index)})
        assert steps.skipped_since(0) == 1
        kept = np.load(tmp_path / "nonfinite" / f"step_3.process_{index}.npz")
        np.testing.assert_array_equal(kept["rows"], np.full(2, index))
        assert (tmp_path / "nonfinite" / "skipped.jsonl").exists() == (index == 0)
    assert capsys.readouterr().out.count("The update is skipped") == 1


def test_a_negative_number_of_updates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_skipped_updates = -1; expected at least 0"):
        toy.run(tmp_path, 1, trainer={"max_skipped_updates": -1})
