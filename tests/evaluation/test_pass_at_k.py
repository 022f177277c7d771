"""pass@k of generated code, from a checkpoint to the numbers, through chunks and the sandbox."""

import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import seqio
import toy

import diffusion_t5x.eval
import diffusion_t5x.train
import gin
from diffusion_t5x import gin_utils
from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.checkpointing.reading import restore_params
from diffusion_t5x.data.detokenize import detokenize
from diffusion_t5x.evaluation import evaluation
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import INIT_SHAPES, abstract_params
from tasks import metrics

CODE = "toy_code"
BATCH = 4


def _postprocess(text, example, is_target):
    """A program that says how long the decoded text is, for this model writes no Python."""
    if is_target:
        return {"tests": ["assert x % 2 == 0"], "code": text}
    return [f"x = {len(one)}" for one in text]


def _register():
    toy.register()
    if CODE not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            CODE,
            source=seqio.FunctionDataSource(toy._examples, splits=list(toy.NUM_EXAMPLES)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=seqio.TaskRegistry.get(toy.TASK).output_features,
            postprocess_fn=_postprocess,
            metric_fns=[metrics.CodeMetric()],
        )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    toy.run(directory, 1, toy.model("diffusion"), period=1)
    return directory


def _evaluate(run_dir, output_dir, num_decodes=3):
    _register()

    def evaluator(**kwargs):
        return evaluation.InferenceEvaluator(
            **kwargs, num_examples=5, num_decodes=num_decodes, decodes_per_chunk=2
        )

    return evaluation.evaluate(
        model=toy.model("diffusion"),
        dataset_cfg=toy.dataset_cfg("test", batch_size=BATCH, mixture_or_task_name=CODE),
        restore_checkpoint_cfg=RestoreCheckpointConfig(str(run_dir), "all"),
        partitioner=PjitPartitioner(),
        output_dir=str(output_dir),
        inference_evaluator_cls=evaluator,
        random_seed=3,
    )


def _metrics(results):
    [row] = results["rows"]
    return {name: value for name, value in row["metrics"].items() if "decode" not in name}


def _samples(output_dir):
    lines = (output_dir / CODE / "predictions-1.jsonl").read_text().splitlines()
    return [json.loads(line)["samples"] for line in lines]


@pytest.fixture
def chunks_drawn(monkeypatch):
    """Numbers of the chunks that were decoded; the run is killed at those in `fail_at`."""
    drawn, fail_at = [], []
    original = evaluation.InferenceEvaluator._predict_chunk

    def predict(self, name, params, dataset, number, size):
        if number in fail_at:
            raise KeyboardInterrupt
        drawn.append(number)
        return original(self, name, params, dataset, number, size)

    monkeypatch.setattr(evaluation.InferenceEvaluator, "_predict_chunk", predict)
    return drawn, fail_at


def _expected(run_dir):
    """Texts of the candidates, from the seed and nothing of the evaluator."""
    model = toy.model("diffusion")
    [(_, path)] = select_checkpoints(RestoreCheckpointConfig(str(run_dir), "all"))
    params = restore_params(path, abstract_params(model, PjitPartitioner(), INIT_SHAPES, {}))
    texts = [f"t{number:03}" for number in range(5)]
    rows = np.array([[*toy.VOCABULARY.encode(text), 0, 0] for text in texts], np.int32)
    samples = [[] for _ in texts]
    for number, size in enumerate((2, 1)):
        owners = np.repeat(np.arange(5), size)
        for start in range(0, len(owners), BATCH):
            of = owners[start : start + BATCH]
            prefix = np.zeros((BATCH, rows.shape[1]), np.int32)
            prefix[: len(of)] = rows[of]
            batch = {name: prefix for name in ("decoder_input_tokens", "decoder_target_tokens")}
            key = jax.random.fold_in(jax.random.PRNGKey(3), number)
            tokens = model.predict_batch(
                params,
                {"encoder_input_tokens": prefix, **batch},
                jax.random.fold_in(key, start // BATCH),
            )
            for row, owner in enumerate(of):
                samples[owner].append(detokenize(np.asarray(tokens[row]), toy.VOCABULARY))
    return samples


def test_a_killed_evaluation_draws_no_chunk_twice_and_gives_what_the_seed_says(
    run_dir, tmp_path, chunks_drawn, capsys, monkeypatch
):
    drawn, fail_at = chunks_drawn
    fail_at.append(1)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(run_dir, tmp_path)
    assert drawn == [0]
    # Reference solutions, of which this task has none that runs, are judged once and spoken of.
    said = "5 of 5 reference solutions do not pass: problem 0 (NameError: name 't000' is not"
    assert said in capsys.readouterr().out
    monkeypatch.setattr(metrics, "_run_references", lambda *_: 1 / 0)
    fail_at.clear()
    results = _evaluate(run_dir, tmp_path)
    assert drawn == [0, 1]
    assert said in capsys.readouterr().out
    samples = _samples(tmp_path)
    assert samples == _expected(run_dir)
    assert any(len(set(texts)) > 1 for texts in samples)
    passes = np.mean([[len(text) % 2 == 0 for text in texts] for texts in samples])
    assert _metrics(results) == pytest.approx(
        {"exact_match": 0, "pass_at_1": passes, "invalid_programs": 0, "examples": 5}
    )
    assert not list((tmp_path / CODE).glob(".candidates*"))
    # Known results are read; another number of candidates is another result.
    assert _metrics(_evaluate(run_dir, tmp_path)) == _metrics(results)
    assert drawn == [0, 1]


def test_a_rerun_trusts_chunks_of_its_own_settings_alone(run_dir, tmp_path, monkeypatch):
    drawn = []

    def predict(self, name, params, dataset, number, size):
        if number == 1:
            raise KeyboardInterrupt
        drawn.append(number)
        return {i: (np.zeros((size, 6), np.int32), np.zeros(size)) for i in range(5)}, {}

    monkeypatch.setattr(evaluation.InferenceEvaluator, "_predict_chunk", predict)
    for num_decodes in (3, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            _evaluate(run_dir, tmp_path, num_decodes)
    assert drawn == [0, 0]


def test_all_samples_of_one_decoding_and_several_decodings_are_not_asked_for_at_once(tmp_path):
    _register()
    with pytest.raises(ValueError, match="return_all_decodes = True and NUM_DECODES = 2"):
        evaluation.InferenceEvaluator(
            toy.model("diffusion"),
            toy.dataset_cfg("test", mixture_or_task_name=CODE),
            PjitPartitioner(),
            str(tmp_path),
            return_all_decodes=True,
            num_decodes=2,
        )


@pytest.mark.slow
def test_the_command_takes_the_number_of_candidates_from_gin(tmp_path):
    _register()
    architecture = ["embed_dim=8", "mlp_dim=8", "num_heads=1", "head_dim=8", "num_layers=1"]
    shared = [
        "--gin_file=models/tiny.gin",
        "--gin_file=objectives/autoregressive.gin",
        "--gin.vocabularies.get_vocabulary.name='bytes'",
        "--gin.vocabularies.get_vocabulary.extra_ids=0",
        "--gin.VOCAB_SIZE=296",
        *(f"--gin.config.TransformerConfig.{field}" for field in architecture),
        "--gin.MIXTURE_OR_TASK_MODULE=toy",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 6}",
        "--gin.BATCH_SIZE=8",
    ]
    diffusion_t5x.train.main(
        [*shared, "--gin_file=runs/pretrain.gin", "--gin.MIXTURE_OR_TASK_NAME=toy_copy",
         f"--gin.MODEL_DIR={tmp_path}/run", "--gin.TRAIN_STEPS=1", "--gin.EVAL_STEPS=1"]
    )  # fmt: skip
    results = diffusion_t5x.eval.main(
        [*shared, "--gin_file=runs/eval.gin", f"--gin.MIXTURE_OR_TASK_NAME={CODE}",
         f"--gin.CHECKPOINT_PATH={tmp_path}/run", f"--gin.EVAL_OUTPUT_DIR={tmp_path}/eval",
         "--gin.EVALUATOR_NUM_EXAMPLES=2", "--gin.NUM_DECODES=10", "--gin.DECODES_PER_CHUNK=4",
         "--gin.TEMPERATURE=1.0", "--gin.BEST_METRIC=pass_at_10"]
    )  # fmt: skip
    samples = _samples(tmp_path / "eval")
    assert [len(texts) for texts in samples] == [10, 10]
    passed = [[len(text) % 2 == 0 for text in texts] for texts in samples]
    values = _metrics(results)
    assert values["pass_at_1"] == pytest.approx(np.mean(passed))
    assert values["pass_at_10"] == np.mean([any(row) for row in passed])
    assert "pass_at_80" not in values


def test_the_documented_command_parses():
    text = (pathlib.Path(__file__).parents[2] / "docs/sandbox.md").read_text(encoding="utf-8")
    [command] = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "diffusion_t5x.eval"]
    files = [word.partition("=")[2] for word in words if word.startswith("--gin_file=")]
    bindings = [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")]
    gin_utils.parse_config(files, bindings)
    settings = "evaluation.InferenceEvaluator"
    assert gin.query_parameter(f"{settings}.num_decodes").scoped_configurable_fn() == 80
    assert gin.query_parameter(f"{settings}.decodes_per_chunk").scoped_configurable_fn() == 8
