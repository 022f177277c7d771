"""Sweeps: the product of values decodes each model once, and quality is drawn against cost."""

import pytest
from fake_commands import FakeCommands

from diffusion_t5x.experiments import __main__ as experiments
from diffusion_t5x.experiments import sweeps

SWEEP = ("NUM_STEPS=2,5", "NUM_SAMPLES=1,4")


@pytest.fixture
def fake(monkeypatch):
    commands = FakeCommands()
    monkeypatch.setattr(experiments, "COMMANDS", commands.commands)
    return commands


def test_values_are_numbers_or_words_and_combined():
    axes = sweeps.parse(["NUM_STEPS=2, 5", "TEMPERATURE=0.2", "HOW=fast,slow"])
    assert axes == {"NUM_STEPS": [2, 5], "TEMPERATURE": [0.2], "HOW": ["fast", "slow"]}
    found = sweeps.decodings({"A": [1, 2], "B": [3, 4]})
    assert list(found) == ["a_1_b_3", "a_1_b_4", "a_2_b_3", "a_2_b_4"]
    assert found["a_2_b_3"] == {"A": 2, "B": 3}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["NUM_STEPS"], r"--sweep=NUM_STEPS; expected a setting and values"),
        (["NUM_STEPS="], "expected a setting and values"),
        (["num_steps=2"], "expected a setting and values"),
        (["NUM_STEPS=2,,5"], "'' is neither a number nor a word"),
        (["NUM_STEPS=2,../x"], "'../x' is neither a number nor a word"),
        (["NUM_STEPS=2,2"], "is given twice"),
        (["NUM_STEPS=2", "NUM_STEPS=5"], "is given twice"),
        (["NUM_STEP=2,5"], "did you mean 'NUM_STEPS'"),
        (["NUM_STEPS=2,0"], "num_steps = 0; expected at least 1"),
        (["NUM_STEPS=2,many"], "NUM_STEPS = 'many'; expected int"),
        (["BATCH_SIZE=8,16"], "decode alike"),
    ],
)
def test_bad_names_and_values_are_refused_before_anything_runs(sweep, message, tmp_path, fake):
    with pytest.raises(ValueError, match=message):
        experiments.Run("table3", "embedded", tmp_path, sweep=sweep).run()
    assert not fake.calls
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_each_combination_decodes_each_model_once_and_is_drawn(tmp_path, fake):
    run = experiments.Run("demo", None, tmp_path, sweep=SWEEP)
    results = run.run()
    tests = [call for call in fake.calls if call.rsplit("/", 1)[-1].startswith("test")]
    assert len(tests) == len(set(tests)) == 2 + 3 * 4  # an AR model has no steps
    names = {row["decoding"] for row in results["rows"] if row["method"] == "autoregressive"}
    assert names == {"num_samples_1", "num_samples_4"}
    assert len(fake.calls) == 3 + 2 * 4 + len(tests)
    assert all(row["decode_passes_per_example"] == 8.0 for row in results["rows"])
    assert run.results_dir.name == "demo_sweep"
    assert (run.results_dir / "cost.png").stat().length > 1000
    assert "decode_passes_per_example" in (run.results_dir / "results.md").read_text()
    curves = experiments.report.Report(run.experiment, run.scale, run.stages_dir)._curves()
    [lines] = curves.values()
    assert len(lines) == 2 + 3 * 2  # a line for each method and number of samples
    assert [point.steps for point in lines["diffusion, NUM_SAMPLES = 4"]] == [2, 5]
    # Another sweep resumes what the two have in common, and so does the experiment itself.
    fake.calls = []
    experiments.Run("demo", None, tmp_path, sweep=("NUM_STEPS=5,9", "NUM_SAMPLES=4")).run()
    assert len(fake.calls) == 3
    experiments.Run("demo", None, tmp_path).run()
    assert len(fake.calls) == 3 + 4
