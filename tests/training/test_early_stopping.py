"""Stopping when a validation metric no longer improves."""

import math

import pytest

from diffusion_t5x.training.early_stopping import EarlyStopping


def _log(*values, split="training_eval", name="loss"):
    lines = [{"step": 10 * i, "split": split, name: value} for i, value in enumerate(values)]
    return [{"step": 0, "split": "train", "loss": 9.0, "seconds": 1.0}, *lines]


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ((3.0, 2.0, 1.0), False),
        ((3.0, 2.0, 2.5), False),
        ((3.0, 2.0, 2.5, 2.4), True),
        ((3.0, 2.0, 2.5, 1.9), False),
        ((2.0, 2.0, 2.0), True),  # no worse is no better
        ((2.0, math.nan, math.nan), True),
        ((), False),
    ],
)
def test_it_stops_after_as_many_evaluations_without_improvement(values, stops):
    assert EarlyStopping(patience=2).should_stop(_log(*values)) is stops


def test_a_metric_of_decoded_text_can_be_the_one_to_be_large():
    stopping = EarlyStopping("inference_eval/squad/f1", "max", patience=1)
    assert stopping.should_stop(_log(50.0, 49.0, split="inference_eval/squad", name="f1"))
    assert not stopping.should_stop(_log(49.0, 50.0, split="inference_eval/squad", name="f1"))


def test_without_patience_nothing_stops_whatever_is_logged():
    assert not EarlyStopping("no/such").should_stop(_log(1.0, 2.0, 3.0))


def test_a_metric_that_is_not_evaluated_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'training_eval/loss'"):
        EarlyStopping("training_eval/los", patience=1).should_stop(_log(1.0))


@pytest.mark.parametrize("field", [{"mode": "largest"}, {"patience": 0}])
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match="expected"):
        EarlyStopping(**field)
