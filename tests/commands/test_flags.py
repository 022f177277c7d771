"""The commands as they are typed: gin files and flags in, files of a run out."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy

import diffusion_t5x.eval
import gin
from diffusion_t5x import gin_utils, infer, models, sample, train
from diffusion_t5x.checkpointing.checkpoints import list_checkpoints
from diffusion_t5x.checkpointing.reading import restore_params
from diffusion_t5x.commands import flags
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.runtime.train_state import INIT_SHAPES, abstract_params
from diffusion_t5x.training.metric_logs import read_metrics

COMMANDS = {"train": train, "eval": diffusion_t5x.eval, "infer": infer, "sample": sample}
# Quotes as T5X wants them, and none, as a shell's user forgets them.
MODEL = [
    "--gin_file=models/tiny.gin",
    "--gin.vocabularies.get_vocabulary.name='bytes'",
    "--gin.vocabularies.get_vocabulary.extra_ids=0",
    "--gin.VOCAB_SIZE=296",
    "--gin_bindings=config.TransformerConfig.embed_dim = 16",
    "--gin_bindings=config.TransformerConfig.mlp_dim = 16",
    "--gin.config.TransformerConfig.num_heads=2",
    "--gin.config.TransformerConfig.head_dim=4",
    "--gin.config.TransformerConfig.num_layers=1",
]
DATA = [
    "--gin.MIXTURE_OR_TASK_NAME='toy_copy'",
    "--gin.MIXTURE_OR_TASK_MODULE=a_module_of_tasks",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 6}",
    "--gin.BATCH_SIZE=8",
]
AUTOREGRESSIVE = "--gin_file=objectives/autoregressive.gin"
DIFFUSION = "--gin_file=objectives/diffusion.gin"
FEW_STEPS = ["--gin.NUM_STEPS=3", "--gin.NUM_SAMPLES=2"]
TRAINING = ["--gin.CHECKPOINT_PERIOD=1", "--gin.EVAL_STEPS=1", "--gin.DROPOUT_RATE=0.1"]
NO_UPDATE = [
    "--gin.optimizers.create_learning_rate_scheduler.base_learning_rate=0.0",
    "--gin.optimizers.create_learning_rate_scheduler.min_learning_rate=0.0",
]


def _run(command, objective, *flags, data=DATA):
    """A command with the run file of its name, or the one among the flags."""
    files = [] if any(flag.startswith("--gin_file=runs/") for flag in flags) else [
        f"--gin_file=runs/{command}.gin"
    ]  # fmt: skip
    return COMMANDS[command].main([*MODEL, objective, *files, *data, *flags])


@pytest.fixture(scope="module", autouse=True)
def _module_of_tasks(tmp_path_factory):
    """A module on the Python path that registers the toy task, as a user's own would."""
    directory = tmp_path_factory.mktemp("path")
    (directory / "a_module_of_tasks.py").write_text("import toy\n\ntoy.register()\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of two autoregressive steps."""
    directory = tmp_path_factory.mktemp("pretrained")
    _run("train", AUTOREGRESSIVE, "--gin_file=runs/pretrain.gin", *TRAINING,
         f"--gin.MODEL_DIR='{directory}'", "--gin.TRAIN_STEPS=2")  # fmt: skip
    return directory


def _adapt(initial, model_dir, *flags):
    return _run("train", DIFFUSION, "--gin_file=runs/adapt.gin", *TRAINING,
                f"--gin.INITIAL_CHECKPOINT_PATH={initial}", f"--gin.MODEL_DIR={model_dir}",
                "--gin.TRAIN_STEPS_RELATIVE=2", *flags)  # fmt: skip


@pytest.fixture(scope="module")
def adapted(pretrained, tmp_path_factory):
    """AR2Diff: a run of two diffusion steps from the autoregressive checkpoint."""
    directory = tmp_path_factory.mktemp("adapted")
    assert int(_adapt(pretrained, directory).step) == 4
    return directory


def _steps(directory):
    return [step for step, _ in list_checkpoints(str(directory))]


def _tree(directory):
    return sorted(str(path) for path in pathlib.Path(directory).rglob("*"))


def test_a_run_leaves_what_a_run_is_said_to_leave(pretrained):
    assert _steps(pretrained) == [1, 2]
    names = {path.name for path in pretrained.iterdir()}
    assert names >= {"config.gin", "model-info.txt", "metrics.jsonl", "train", "training_eval"}
    lines = [(line["step"], line["split"]) for line in read_metrics(str(pretrained))]
    assert lines == [(2, "train"), (2, "training_eval")]
    assert "NextToken" in (pretrained / "config.gin").read_text()


def test_ar2diff_is_another_objective_file_and_an_initial_checkpoint(pretrained, adapted):
    assert _steps(adapted) == [3, 4]
    configs = [(path / "config.gin").read_text() for path in (pretrained, adapted)]
    network = [
        [
            line
            for line in text.splitlines()
            if line.startswith("config.TransformerConfig") and "%SELF_" not in line
        ]
        for text in configs
    ]
    assert network[0] == network[1] != []
    assert "StepUnrolledDenoising" in configs[1]
    assert "NextToken" not in configs[1]


@pytest.mark.slow
def test_a_written_configuration_is_the_same_model_and_the_same_run(pretrained, adapted, tmp_path):
    gin_utils.parse_config([str(adapted / "config.gin")], [])
    again = gin.get_configurable(models.Model)()
    gin.clear_config()
    bindings = [flag.partition("=")[2] for flag in flags.rewrite_gin_flags(MODEL[1:])]
    gin_utils.parse_config(
        ["models/tiny.gin", "objectives/diffusion.gin"], [*bindings, "DROPOUT_RATE=0.1"]
    )
    typed = gin.get_configurable(models.Model)()
    assert again.module == typed.module
    assert (again.objective, again.decoder) == (typed.objective, typed.decoder)
    # The run can be had again in another directory; here without updates, so that its parameters
    # are those of the autoregressive checkpoint.
    state = train.main([f"--gin_file={adapted}/config.gin", f"--gin.MODEL_DIR={tmp_path}",
                        "--gin.TRAIN_STEPS_RELATIVE=1", *NO_UPDATE])  # fmt: skip
    assert int(state.step) == 3
    assert _steps(tmp_path) == [3]
    abstract = abstract_params(again, PjitPartitioner(), INIT_SHAPES, {})
    params = [
        restore_params(str(path), abstract)
        for path in (pretrained / "checkpoint_2", adapted / "checkpoint_4")
    ]
    jax.tree.map(np.testing.assert_array_equal, state.params, params[0])
    embeddings = [tree["token_embedder"]["embedding"] for tree in params]
    assert not np.array_equal(*embeddings)


def test_eval_measures_all_checkpoints_of_a_run(adapted, tmp_path):
    results = _run("eval", DIFFUSION, *FEW_STEPS, f"--gin.CHECKPOINT_PATH={adapted}",
                   f"--gin.EVAL_OUTPUT_DIR={tmp_path}", "--gin.EVALUATOR_NUM_EXAMPLES=3",
                   "--gin.BEST_METRIC=exact_match")  # fmt: skip
    written = json.loads((tmp_path / "results.json").read_text())
    assert {key: written[key] for key in results} == results
    assert [(row["step"], row["task"]) for row in written["rows"]] == [(3, toy.TASK), (4, toy.TASK)]
    for row in written["rows"]:
        assert row["metrics"]["examples"] == 3
        assert "num_steps=3, num_samples=2" in row["settings"]["decoder"]
        lines = (tmp_path / toy.TASK / f"predictions-{row['step']}.jsonl").read_text().splitlines()
        # The test split is the default of the run file.
        assert [json.loads(line)["inputs"] for line in lines] == ["t000", "t001", "t002"]
    assert written["best"]["metric"] == "exact_match"
    table = (tmp_path / "results.md").read_text()
    assert table.startswith("| step | task |")
    assert len(table.splitlines()) == 4


@pytest.mark.parametrize("mode", ["predict", "score"])
def test_infer_writes_a_line_for_each_example(adapted, tmp_path, mode):
    [path] = _run("infer", DIFFUSION, *FEW_STEPS, f"--gin.CHECKPOINT_PATH={adapted}/checkpoint_3",
                  f"--gin.INFER_OUTPUT_DIR={tmp_path}",
                  f"--gin.inference.infer.mode={mode}")  # fmt: skip
    assert pathlib.Path(path).parent == tmp_path
    records = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    assert [record["inputs"]["inputs_pretokenized"] for record in records] == [
        f"t{number:03}" for number in range(toy.NUM_EXAMPLES["test"])
    ]
    assert all(("prediction" in record) == (mode == "predict") for record in records)
    assert all(np.isfinite(record["score"]) for record in records)


def test_sample_prints_every_step_of_a_canvas(adapted, capsys):
    # Nothing is read from a task.
    given = ["--gin.MIXTURE_OR_TASK_NAME=unused", *DATA[2:3]]
    outputs = _run("sample", DIFFUSION, *FEW_STEPS, f"--gin.CHECKPOINT_PATH={adapted}",
                   "--gin.INPUTS=('ab', '5 cd')", "--gin.SHOW_TRAJECTORY=True",
                   data=given)  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ab  ->  {outputs[0]}"
    assert f"5 cd  ->  {outputs[1]}" in lines
    assert [line.split(":")[0].split() for line in lines[1:5]] == [
        ["step", str(number)] for number in range(4)
    ]
    assert len(outputs) == 2


def test_sample_takes_one_text_as_it_is_typed(pretrained, capsys):
    [output] = _run("sample", AUTOREGRESSIVE, f"--gin.CHECKPOINT_PATH={pretrained}",
                    "--gin.INPUTS=5 min")  # fmt: skip
    assert capsys.readouterr().out == f"5 min  ->  {output}\n"
    with pytest.raises(ValueError, match="trajectory"):
        _run("sample", AUTOREGRESSIVE, f"--gin.CHECKPOINT_PATH={pretrained}",
             "--gin.INPUTS=5 min", "--gin.SHOW_TRAJECTORY=True")  # fmt: skip


def test_a_dry_run_compiles_and_writes_nothing(pretrained, tmp_path, capsys):
    before = _tree(pretrained)
    out = tmp_path / "out"
    checkpoint = f"--gin.CHECKPOINT_PATH={pretrained}"
    _adapt(pretrained, out, "--dry_run")
    printed = capsys.readouterr().out
    variables = 296 * 16 + 4 * 16 * 8 + 3 * 16 * 16 + 3 * 16 + 2 * 32
    assert f"parameters: {variables:,}" in printed
    _run("eval", DIFFUSION, checkpoint, f"--gin.EVAL_OUTPUT_DIR={out}", "--dry_run")
    assert str(pretrained / "checkpoint_1") in capsys.readouterr().out
    _run("infer", DIFFUSION, checkpoint, f"--gin.INFER_OUTPUT_DIR={out}", "--dry_run")
    assert f"{out}/toy_copy-predict.jsonl" in capsys.readouterr().out
    assert _run("sample", DIFFUSION, checkpoint, "--gin.INPUTS=ab", "--dry_run") == []
    assert not out.exists()
    assert _tree(pretrained) == before


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--gin_file=objectives/difusion.gin"], FileNotFoundError, "objectives/difusion.gin"),
        (["--gin.TRAIN_STPES=2"], ValueError, "did you mean 'TRAIN_STEPS'"),
        (["--gin.TRAIN_STEPS"], ValueError, "expected NAME=VALUE"),
        (["--gin_bindings=TRAIN_STEPS"], ValueError, "expected NAME=VALUE"),
        ([], ValueError, "Set TRAIN_STEPS or TRAIN_STEPS_RELATIVE"),
        (["--gin.TRAIN_STEPS=2", "--gin.VOCAB_SIZE=100"], ValueError, "set VOCAB_SIZE to at least"),
        (["--gin.TRAIN_STEPS=2", "--gin.MIXTURE_OR_TASK_MODULE=no_module"], ModuleNotFoundError,
         "MIXTURE_OR_TASK_MODULE = 'no_module'"),
        (["--gin.TRAIN_STEPS=2", "--gin.MIXTURE_OR_TASK_NAME=toy_coppy"], ValueError,
         "did you mean 'toy_copy'"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_by_the_name_of_the_setting(tmp_path, flags, error, message):
    with pytest.raises(error, match=message):
        _run("train", AUTOREGRESSIVE, "--gin_file=runs/pretrain.gin", f"--gin.MODEL_DIR={tmp_path}",
             *flags)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_what_a_run_needs_and_was_not_given_is_named():
    with pytest.raises(ValueError, match="MODEL_DIR"):
        _run("train", AUTOREGRESSIVE, "--gin_file=runs/pretrain.gin", "--gin.TRAIN_STEPS=2")


def test_an_unknown_or_shortened_flag_is_refused(capsys):
    for flag in ("--gin_fil=models/tiny.gin", "--model=tiny"):
        with pytest.raises(SystemExit) as error:
            train.main([flag])
        assert error.value.code == 2
        assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_flag_of_t5x(command, capsys):
    with pytest.raises(SystemExit) as error:
        COMMANDS[command].main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "gin_file", "gin_bindings", "gin_search_paths", "tfds_data_dir", "dry_run", "gin.NAME",
        "seqio_additional_cache_dirs", "coordinator_address", "process_count", "process_index",
    ):  # fmt: skip
        assert f"--{flag}" in text


def test_help_and_gin_utils_need_neither_jax_nor_tensorflow():
    text = (
        "import contextlib, sys\n"
        "from diffusion_t5x import gin_utils, train\n"
        "with contextlib.suppress(SystemExit):\n"
        "    train.main(['--help'])\n"
        "sys.exit(bool({'jax', 'flax', 'tensorflow'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True, stdout=subprocess.DEVNULL)


def test_gin_flags_become_bindings_whatever_their_value():
    argv = ["--gin.A=1", "--gin_file=f.gin", "--gin.x.y=--gin.z", "--gin_bindings=B = 2"]
    assert flags.rewrite_gin_flags(argv) == [
        "--gin_bindings=A=1", "--gin_file=f.gin", "--gin_bindings=x.y=--gin.z",
        "--gin_bindings=B = 2",
    ]  # fmt: skip


def test_each_command_starts_from_a_clean_configuration(pretrained, tmp_path):
    gin.parse_config("STALE = 3")
    _run("sample", AUTOREGRESSIVE, f"--gin.CHECKPOINT_PATH={pretrained}", "--gin.INPUTS=ab")
    with pytest.raises(ValueError, match="has no bound parameters"):
        gin.query_parameter("%STALE")


def test_flags_of_processes_and_data_reach_jax_and_seqio(pretrained, tmp_path, monkeypatch):
    import seqio

    calls = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.update(processes=args))
    monkeypatch.setattr(seqio, "add_global_cache_dirs", lambda dirs: calls.update(caches=dirs))
    monkeypatch.setattr(seqio, "set_tfds_data_dir_override", lambda path: calls.update(tfds=path))
    (tmp_path / "mine.gin").write_text(f"CHECKPOINT_PATH = '{pretrained}'\nINPUTS = 'ab'\n")
    outputs = _run(
        "sample", AUTOREGRESSIVE, "--coordinator_address=host:1234", "--process_count=2",
        "--process_index=1", "--seqio_additional_cache_dirs=/one,/two", "--tfds_data_dir=/three",
        f"--gin_search_paths=/nowhere,{tmp_path}", "--gin_file=mine.gin",
    )  # fmt: skip
    assert len(outputs) == 1
    assert calls == {"processes": ("host:1234", 2, 1), "caches": ["/one", "/two"], "tfds": "/three"}


def test_compiled_functions_are_kept_for_the_next_start_where_jax_or_the_cache_says(
    tmp_path, monkeypatch
):
    before = jax.config.jax_compilation_cache_dir
    parser = flags.make_parser("")
    try:
        monkeypatch.setenv("DIFFUSION_T5X_CACHE", str(tmp_path / "ours"))
        jax.config.update("jax_compilation_cache_dir", None)
        flags.start(parser, [])
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ours" / "xla")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
        flags.start(parser, [])
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "users")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def _log(*argv, cwd):
    """What a command's start with these flags, and then one message of each level, prints."""
    text = (
        "import sys\nfrom absl import logging\nfrom diffusion_t5x.commands import flags\n"
        "flags._import_tensorflow = lambda quiet: quiet and logging.set_verbosity(logging.ERROR)\n"
        "args = flags.start(flags.make_parser(''), sys.argv[1:])\n"
        "logging.debug('a detail'); logging.info('a fact'); logging.warning('a worry')\n"
        "assert args.gin_file == ['a.gin'], args\n"
    )
    command = [sys.executable, "-c", text, *argv, "--gin_file", "a.gin"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return {word for word in ("detail", "fact", "worry") if f"a {word}" in done.stderr}


@pytest.mark.slow
def test_logging_flags_of_t5x_are_obeyed(tmp_path):
    assert _log(cwd=tmp_path) == set()
    assert _log("--alsologtostderr", cwd=tmp_path) == {"fact", "worry"}
    assert _log("-v", "1", "--logtostderr", cwd=tmp_path) == {"detail", "fact", "worry"}
    logs = ["--log_dir=logs", "--stderrthreshold=warning", "--noalsologtostderr"]
    assert _log("--verbosity=0", *logs, cwd=tmp_path) == {"worry"}
    [file] = [path for path in (tmp_path / "logs").iterdir() if not path.is_symlink()]
    assert "a fact" in file.read_text()


@pytest.mark.parametrize("flag", ["--verbosity=loud", "--stderrthreshold=no", "--log_dir=/proc/x"])
def test_a_wrong_logging_flag_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        train.main([flag])
    assert flag.partition("=")[2] in capsys.readouterr().err
