"""Every mistake in a configuration is an error by the setting's name, before any compilation.

Each is made in a run and in a dry run.
"""

import jax
import pytest
import toy

from diffusion_t5x import train
from diffusion_t5x.checkpointing.reading import CheckpointMismatchError
from diffusion_t5x.runtime import partitioning
from diffusion_t5x.training.run_record import OtherRunError

PRETRAIN = "--gin_file=runs/pretrain.gin"
ADAPT = "--gin_file=runs/adapt.gin"
AUTOREGRESSIVE = "--gin_file=objectives/autoregressive.gin"
DIFFUSION = "--gin_file=objectives/diffusion.gin"
NETWORK = "--gin.config.TransformerConfig"
INITIAL = "--gin.INITIAL_CHECKPOINT_PATH"
FLAGS = {
    "MIXTURE_OR_TASK_NAME": toy.TASK,
    "MIXTURE_OR_TASK_MODULE": "a_module_of_two_tasks",
    "TASK_FEATURE_LENGTHS": {"inputs": 6, "targets": 6},
    "BATCH_SIZE": 8,
    "TRAIN_STEPS": 2,
    "vocabularies.get_vocabulary.name": "bytes",
    "vocabularies.get_vocabulary.extra_ids": 0,
    "VOCAB_SIZE": 264,
    "config.TransformerConfig.embed_dim": 8,
    "config.TransformerConfig.mlp_dim": 8,
    "config.TransformerConfig.num_heads": 1,
    "config.TransformerConfig.head_dim": 8,
    "config.TransformerConfig.num_layers": 1,
}
OTHER_TASK = "toy_other"
MODULE = f"""
import seqio
import toy

task = seqio.TaskRegistry.get(toy.register())
if {OTHER_TASK!r} not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
        {OTHER_TASK!r}, source=task.source, preprocessors=task.preprocessors,
        output_features=task.output_features, metric_fns=[],
    )
"""


class CompiledError(AssertionError):
    """Something was compiled."""


def _train(model_dir, *flags, objective=AUTOREGRESSIVE, run=PRETRAIN, without=None):
    given = [f"--gin.{name}={value!r}" for name, value in FLAGS.items() if name != without]
    model_dir = [] if without == "MODEL_DIR" else [f"--gin.MODEL_DIR={model_dir}"]
    return train.main(["--gin_file=models/tiny.gin", objective, run, *given, *model_dir, *flags])


@pytest.fixture(scope="module", autouse=True)
def _module_of_tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("path")
    (directory / "a_module_of_two_tasks.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps."""
    directory = tmp_path_factory.mktemp("runs") / "pretrained"
    _train(directory)
    return directory


@pytest.fixture
def compilation_is_an_error(monkeypatch):
    def refuse(*args):
        raise CompiledError

    # All that the runtime compiles is an object of this class.
    monkeypatch.setattr(partitioning.JittedFunction, "lower", refuse)
    monkeypatch.setattr(partitioning.JittedFunction, "__call__", refuse)


# What is typed wrong -> the error, and what its message says.
MISTAKES = {
    "a gin file": (["--gin_file=models/tyny.gin"], FileNotFoundError,
        ["--gin_file=models/tyny.gin", "did you mean 'models/tiny.gin'?"]),
    "a macro": (["--gin.TRAIN_STPES=2"], ValueError,
        ["--gin.TRAIN_STPES=2", "did you mean 'TRAIN_STEPS'?"]),
    "a macro in a file": (["--gin_file={tmp}/mine.gin"], ValueError,
        ["mine.gin sets 'BATCH_SIZ', which nothing reads; did you mean 'BATCH_SIZE'?"]),
    "a parameter": (["--gin.trainer.train.total_stepz=2"], ValueError,
        ["trainer.train.total_stepz", "did you mean 'total_steps'?"]),
    "a function": (["--gin.trianer.train.total_steps=2"], ValueError,
        ["'trianer.train'", "did you mean 'trainer.train'?"]),
    "a task": (["--gin.MIXTURE_OR_TASK_NAME=toy_coppy"], ValueError,
        ["MIXTURE_OR_TASK_NAME = 'toy_coppy'", "did you mean 'toy_copy'"]),
    "a module of tasks": (["--gin.MIXTURE_OR_TASK_MODULE=no_module"], ModuleNotFoundError,
        ["MIXTURE_OR_TASK_MODULE = 'no_module'", "such as 'diffusion_t5x.tasks'"]),
    "a split": (["--gin.train/datasets.DatasetConfig.split=trian"], ValueError,
        ["split = 'trian'", "did you mean 'train'?", "Known: test, train, validation"]),
    "a split to evaluate": (["--gin.train_eval/datasets.DatasetConfig.split=dev"], ValueError,
        ["split = 'dev'", "Known: test, train, validation"]),
    "a feature": (["--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'target': 6}"], ValueError,
        ["TASK_FEATURE_LENGTHS = {'inputs': 6, 'target': 6} lacks targets", "'target'?"]),
    "a length": (["--gin.TASK_FEATURE_LENGTHS={'inputs': 0, 'targets': 6}"], ValueError,
        ["TASK_FEATURE_LENGTHS = {'inputs': 0, 'targets': 6}", "positive"]),
    "lengths that are a number": (["--gin.TASK_FEATURE_LENGTHS=6"], ValueError,
        ["TASK_FEATURE_LENGTHS = 6", "such as {'inputs': 64, 'targets': 32}"]),
    "no batch": (["--gin.BATCH_SIZE=0"], ValueError, ["BATCH_SIZE = 0", "positive"]),
    "a batch in quotes": (["--gin.BATCH_SIZE='8'"], ValueError, ["BATCH_SIZE = '8'"]),
    "partitions": (["--gin.partitioning.PjitPartitioner.num_partitions=64"], ValueError,
        ["num_partitions = 64", "expected one of"]),
    "microbatches": (["--gin.trainer.Trainer.num_microbatches=3"], ValueError,
        ["num_microbatches = 3", "BATCH_SIZE = 8", "[1, 2, 4, 8]"]),
    "too few embeddings": (["--gin.VOCAB_SIZE=100"], ValueError,
        ["vocab_size = 100", "259 tokens", "set VOCAB_SIZE to at least"]),
    "another vocabulary": (["--gin.vocabularies.get_vocabulary.extra_ids=3"], ValueError,
        ["MIXTURE_OR_TASK_NAME = 'toy_copy'", "259 tokens, 0", "VOCABULARY is", "262 tokens, 3"]),
    "steps in words": (["--gin.TRAIN_STEPS=many"], ValueError, ["TRAIN_STEPS = 'many'"]),
    "no steps": (["--gin.TRAIN_STEPS=0"], ValueError, ["TRAIN_STEPS = 0", "positive"]),
    "no steps said": (["--gin.TRAIN_STEPS=None"], ValueError,
        ["Set TRAIN_STEPS or TRAIN_STEPS_RELATIVE"]),
    "a period": (["--gin.EVAL_PERIOD=0"], ValueError, ["EVAL_PERIOD = 0", "positive"]),
}  # fmt: skip
# The same of what a run starts from.
OF_CHECKPOINTS = {
    "a checkpoint": ([ADAPT, INITIAL + "={run}/checkpoint_1"], FileNotFoundError,
        ["INITIAL_CHECKPOINT_PATH: ", "pretrained/checkpoint_1 is neither",
         "did you mean 'checkpoint_2'?"]),
    "a run": ([ADAPT, INITIAL + "={run}/../pretraind"], FileNotFoundError,
        ["INITIAL_CHECKPOINT_PATH: ", "pretraind is neither", "did you mean 'pretrained'?"]),
    "steps that are over": ([ADAPT, INITIAL + "={run}"], ValueError,
        ["TRAIN_STEPS = 2", "at step 2", "more than 2", "TRAIN_STEPS_RELATIVE"]),
    "further steps": ([ADAPT, INITIAL + "={run}", "--gin.TRAIN_STEPS_RELATIVE=-1"], ValueError,
        ["TRAIN_STEPS_RELATIVE = -1", "positive"]),
    "the size of an initial checkpoint": (
        [ADAPT, INITIAL + "={run}", "--gin.TRAIN_STEPS=3", NETWORK + ".mlp_dim=16"],
        CheckpointMismatchError, ["{run}/checkpoint_2", "has [8, 8], the model [8, 16]"]),
    "the size of parameters alone": (
        [ADAPT, INITIAL + "={run}", "--gin.checkpoints.RestoreCheckpointConfig.params_only=True",
         NETWORK + ".mlp_dim=16"],
        CheckpointMismatchError, ["{run}/checkpoint_2", "has [8, 8], the model [8, 16]"]),
    "the directory of another network": (["--gin.MODEL_DIR={run}", NETWORK + ".mlp_dim=16"],
        OtherRunError, ["MODEL_DIR = '{run}'", "network.config.mlp_dim: 8 there, 16 here",
        "INITIAL_CHECKPOINT_PATH = '{run}'"]),
    "the directory of another objective": (["--gin.MODEL_DIR={run}", DIFFUSION], OtherRunError,
        ["objective: NextToken there, StepUnrolledDenoising here", "Set another MODEL_DIR"]),
    "the directory of another mixture": (
        ["--gin.MODEL_DIR={run}", f"--gin.MIXTURE_OR_TASK_NAME={OTHER_TASK}"], OtherRunError,
        ["MIXTURE_OR_TASK_NAME: toy_copy there, toy_other here", "Set another MODEL_DIR"]),
    "the directory of another optimiser": (
        ["--gin.MODEL_DIR={run}", "--gin_file={tmp}/adamw.gin"],
        CheckpointMismatchError, ["{run}/checkpoint_2 does not fit this optimiser"]),
}  # fmt: skip


def _refused(tmp_path, model_dir, flags, error, texts, dry_run, run=""):
    (tmp_path / "mine.gin").write_text("BATCH_SIZ = 4\n")
    (tmp_path / "adamw.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom diffusion_t5x.training import optimizers\n"
        "OPTIMIZER = @optimizers.adamw()\n"
    )
    flags = [flag.replace("{tmp}", str(tmp_path)).replace("{run}", str(run)) for flag in flags]
    with pytest.raises(error) as caught:
        _train(model_dir, *flags, *["--dry_run"] * dry_run)
    for text in texts:
        assert text.replace("{run}", str(run)) in str(caught.value)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_compiled_or_written(
    tmp_path, name, dry_run, compilation_is_an_error
):
    _refused(tmp_path, tmp_path / "run", *MISTAKES[name], dry_run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", OF_CHECKPOINTS)
def test_a_wrong_start_is_refused_before_anything_is_compiled_or_written(
    tmp_path, finished, name, dry_run, compilation_is_an_error
):
    before = sorted(path.name for path in finished.iterdir())
    _refused(tmp_path, tmp_path / "run", *OF_CHECKPOINTS[name], dry_run, finished)
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in finished.iterdir()) == before


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", ["MODEL_DIR", "MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS"])
def test_what_is_not_given_is_asked_for(tmp_path, name, dry_run):
    with pytest.raises(ValueError, match=f"{name} is required; give --gin.{name}=VALUE"):
        _train(tmp_path, *["--dry_run"] * dry_run, without=name)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_batch_that_the_data_axis_does_not_divide_is_refused(
    tmp_path, dry_run, monkeypatch, compilation_is_an_error
):
    several = jax.devices()[:1] * 3
    monkeypatch.setattr(partitioning.jax, "devices", lambda *args: several)
    _refused(tmp_path, tmp_path / "run", [], ValueError, ["BATCH_SIZE = 8", " 3 data"], dry_run)


def test_without_a_mistake_the_same_command_goes_on_to_compile(tmp_path, compilation_is_an_error):
    for flags in ([], ["--dry_run"]):
        with pytest.raises(CompiledError):
            _train(tmp_path / "run", *flags)


def test_a_run_may_go_on_with_more_steps_and_other_periods(
    tmp_path, finished, compilation_is_an_error, capsys
):
    changed = ["--gin.TRAIN_STEPS=5", "--gin.EVAL_PERIOD=7", "--gin.CHECKPOINT_PERIOD=3",
               "--gin.DROPOUT_RATE=0.1", NETWORK + ".remat=full"]  # fmt: skip
    with pytest.raises(CompiledError):
        _train(finished, *changed, "--dry_run")
    text = capsys.readouterr().out
    assert f"resuming from {finished}/checkpoint_2; 3 steps to train, up to step 5" in text


def test_a_finished_run_that_is_started_again_ends_well_and_says_so(
    finished, compilation_is_an_error, capsys
):
    assert int(_train(finished).step) == 2
    assert "nothing left to train: step 2 of 2 is reached" in capsys.readouterr().out
    with pytest.raises(CompiledError):
        _train(finished, "--dry_run")
    assert "nothing left to train: step 2 of 2 is reached" in capsys.readouterr().out
