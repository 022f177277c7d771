"""Inference files: in order, nothing lost or repeated, whatever is killed or split."""

import json

import pytest
import toy

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig
from diffusion_t5x.evaluation import inference
from diffusion_t5x.runtime.partitioning import PjitPartitioner


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    toy.run(directory, 1, toy.model("diffusion"))
    return directory


def _infer(run_dir, output_dir, **kwargs):
    cfg = kwargs.pop("dataset_cfg", toy.dataset_cfg("validation", batch_size=2))
    [path] = inference.infer(
        model=toy.model("diffusion"),
        dataset_cfg=cfg,
        restore_checkpoint_cfg=RestoreCheckpointConfig(str(run_dir)),
        partitioner=PjitPartitioner(),
        output_dir=str(output_dir),
        checkpoint_period=2,
        **kwargs,
    )
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


EXPECTED = [f"v{number:03}" for number in range(11)]


def test_a_line_per_example_in_order_and_nothing_else_left(run_dir, tmp_path):
    records = _infer(run_dir, tmp_path)
    assert [record["inputs"]["inputs_pretokenized"] for record in records] == EXPECTED
    assert all(isinstance(record["prediction"], str) for record in records)
    assert {path.name for path in tmp_path.iterdir()} == {
        "toy_copy-predict.jsonl-00000-of-00001",
        ".toy_copy-predict.jsonl-00000-of-00001.settings",
    }


def test_killed_and_started_again_it_resumes_and_gives_the_same(
    run_dir, tmp_path, monkeypatch, capsys
):
    whole = _infer(run_dir, tmp_path / "whole")
    calls = []
    original = inference.Predictor.__call__

    def counted(self, params, batch, index):
        calls.append(index)
        if fail and index == 4:
            raise RuntimeError("killed")
        return original(self, params, batch, index)

    monkeypatch.setattr(inference.Predictor, "__call__", counted)
    fail = True
    with pytest.raises(RuntimeError):
        _infer(run_dir, tmp_path / "killed")
    fail = False
    assert _infer(run_dir, tmp_path / "killed") == whole
    assert calls == [0, 1, 2, 3, 4, 4, 5]
    assert _infer(run_dir, tmp_path / "killed") == whole
    assert calls == [0, 1, 2, 3, 4, 4, 5]
    output = tmp_path / "killed" / "toy_copy-predict.jsonl-00000-of-00001"
    output.write_bytes(output.read_bytes()[:-5])
    assert _infer(run_dir, tmp_path / "killed") == whole
    assert f"{output} is damaged" in capsys.readouterr().out
    assert _infer(run_dir, tmp_path / "killed", random_seed=7) is not None
    assert len(calls) == 19


def test_a_damaged_part_and_those_of_other_settings_are_decoded_again(
    run_dir, tmp_path, monkeypatch, capsys
):
    calls = []
    original = inference.Predictor.__call__

    def counted(self, params, batch, index):
        calls.append(index)
        if index == fail_at:
            raise RuntimeError("killed")
        return original(self, params, batch, index)

    monkeypatch.setattr(inference.Predictor, "__call__", counted)
    fail_at = 4
    for seed in (7, 0):
        with pytest.raises(RuntimeError):
            _infer(run_dir, tmp_path, random_seed=seed)
    fail_at = None
    [part] = tmp_path.glob(".*.parts/part-000001.jsonl")
    part.write_text(part.read_text()[:-1])
    assert len(_infer(run_dir, tmp_path)) == 11
    assert calls == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert f"{part} is damaged" in capsys.readouterr().out


def test_a_finished_file_that_was_changed_is_named_and_written_again(run_dir, tmp_path, capsys):
    expected = _infer(run_dir, tmp_path)
    [file] = tmp_path.glob("toy*.jsonl-*")
    file.write_text(file.read_text().replace("v003", "v004"))
    assert _infer(run_dir, tmp_path) == expected
    assert f"{file} is damaged" in capsys.readouterr().out


@pytest.mark.slow
def test_shards_together_are_the_whole(run_dir, tmp_path):
    shards = [_infer(run_dir, tmp_path, shard_id=i, num_shards=3) for i in range(3)]
    texts = [record["inputs"]["inputs_pretokenized"] for shard in shards for record in shard]
    assert sorted(texts) == EXPECTED
    assert len(list(tmp_path.glob("*-of-00003"))) == 3


def test_scores_of_targets_and_all_samples(run_dir, tmp_path):
    scored = _infer(run_dir, tmp_path, mode="score")
    assert all("prediction" not in record and record["score"] < 0 for record in scored)
    sampled = _infer(run_dir, tmp_path, return_all_decodes=True)
    for record in sampled:
        assert len(record["samples"]) == 2
        assert record["samples"][-1] == record["prediction"]
        assert record["scores"] == sorted(record["scores"])


def test_a_task_with_inputs_alone_is_decoded(run_dir, tmp_path):
    import seqio

    name = "toy_inputs_alone"
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: toy._examples(split).map(
                    lambda x: {"inputs": x["inputs"]}
                ),
                splits=["validation"],
            ),
            preprocessors=[seqio.preprocessors.tokenize],
            output_features={"inputs": seqio.Feature(toy.VOCABULARY, add_eos=False)},
        )
    cfg = toy.dataset_cfg("validation", batch_size=4, mixture_or_task_name=name)
    assert len(_infer(run_dir, tmp_path, dataset_cfg=cfg)) == 11


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "predicts"}, "expected 'predict' or 'score'"),
        ({"shard_id": 3, "num_shards": 3}, "0 <= shard_id < num_shards"),
    ],
)
def test_mistakes_are_refused(run_dir, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _infer(run_dir, tmp_path, **kwargs)
