"""What is typed: values are of their parameters' types, texts stay as typed, others are refused."""

import pathlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

import gin
from diffusion_t5x import gin_utils, gin_values

FILES = ["models/encoder_decoder/tiny.gin", "objectives/diffusion.gin"]
TRAINING = {
    "MODEL_DIR": "x",
    "INITIAL_CHECKPOINT_PATH": "x",
    "MIXTURE_OR_TASK_NAME": "x",
    "TASK_FEATURE_LENGTHS": "{'inputs': 1}",
}
SAMPLING = {"CHECKPOINT_PATH": "x", "TASK_FEATURE_LENGTHS": "{'inputs': 1}", "INPUTS": "x"}


def _parse(*assignments, run="runs/finetune.gin", files=()):
    gin.clear_config()
    given = SAMPLING if "sample" in run else TRAINING
    required = [f"{name}={value}" for name, value in given.items()]
    gin_utils.parse_config([*FILES, run, *files], [*required, *assignments])


def _value(assignment, **where):
    _parse(assignment, **where)
    name = assignment.partition("=")[0].strip()
    return gin.query_parameter(name if "." in name else f"%{name}")


@pytest.mark.parametrize(
    ("assignment", "meant"),
    [
        ("PACK=false", "False"),
        ("PACK=OFF", "False"),
        ("PACK=yes", "True"),
        ("PACK=1", "True"),
        ("PACK='False'", "False"),
        ("USE_CACHED_TASKS=no", "False"),
        ("datasets.DatasetConfig.shuffle=no", "False"),
        ("EVAL_STEPS=none", "None"),
        ("EVAL_STEPS=null", "None"),
        ("PATIENCE=no", "None"),
        ("trainer.train.step_timeout_seconds=off", "None"),
        ("MIXTURE_OR_TASK_MODULE=none", "None"),
        ("LOSS_NORMALIZING_FACTOR=none", "None"),
        ("NUM_SAMPLES='2'", "2"),
        ("NUM_SAMPLES=2.0", "2"),
        ("BATCH_SIZE=32.0", "32"),
        ("TRAIN_STEPS=1e3", "1000"),
        ("TRAIN_STEPS=10,000", "10000"),
        ("EVAL_PERIOD=10k", None),
        ("RANDOM_SEED=", None),
        ("RANDOM_SEED=True", "1"),
        ("DROPOUT_RATE=0,1", "0.1"),
        ("Z_LOSS='1e-4'", "0.0001"),
        ("LABEL_SMOOTHING=None", None),
        ("config.TransformerConfig.dtype=bf16", "'bfloat16'"),
        ("config.TransformerConfig.dtype=fp16", "'float16'"),
        ("config.TransformerConfig.tied_logits=true", "True"),
        ("config.TransformerConfig.mlp_activations=relu", "('relu',)"),
        ("checkpoints.SaveCheckpointConfig.best_mode=maximum", None),
        ("TASK_FEATURE_LENGTHS={inputs: 64}", None),
        ("TASK_FEATURE_LENGTHS={'inputs': '64'}", None),
        ("TASK_FEATURE_LENGTHS={'inputs': True}", None),
        ("MC4_LANGUAGES=en", "('en',)"),
        ("VOCABULARY=bytes", None),
        ("trainer.Trainer.learning_rate_fn=0.1", None),
        ("MODEL_DIR=None", "'None'"),
        ("CORRUPTION=@corruption.UniformCorruption", "@corruption.UniformCorruption()"),
        ("MODEL_DIR=@optimizers.adamw", None),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_was_meant(assignment, meant):
    with pytest.raises(ValueError, match=r"expected ") as error:
        _parse(assignment)
    name, _, value = assignment.partition("=")
    assert f"{name} = " in str(error.value)
    assert value.strip("'") in str(error.value) or not isinstance(eval(value), str)
    if meant is not None:
        assert f"Did you mean {meant}?" in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["2024", "1e-3", "007", "1_000", "[x]", "[1, 2]", "(1, 2)", "{}", "a b", " a ", "/data/a@b%c",
     "@home now", "%5", "2024#1", "x#y", "True", "false", "no", "a=b", "It's", "gs://b/r", "日本"],
)  # fmt: skip
def test_a_text_stays_as_it_was_typed_where_a_text_is_expected(text):
    assert _value(f"MODEL_DIR={text}") == text
    assert _value(f"INPUTS={text}", run="runs/sample.gin") == text
    assert _value(f"INPUTS={text!r}", run="runs/sample.gin") == text  # as T5X wants it


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("PACK=True ", True),
        ("PACK = True ", True),
        ("MODEL_DIR =  /tmp/a ", "/tmp/a"),
        ('MODEL_DIR="/tmp/x"', "/tmp/x"),
        ("EVAL_STEPS=None", None),
        ("DROPOUT_RATE=1", 1),
        ("LOSS_NORMALIZING_FACTOR=2", 2),
        ("config.TransformerConfig.dtype=bfloat16", "bfloat16"),
        ("config.TransformerConfig.mlp_activations=['gelu', 'linear']", ["gelu", "linear"]),
        ("MIXTURE_OR_TASK_NAME=('a', 'b')", ("a", "b")),
        ("MIXTURE_OR_TASK_NAME=['a', 'b']", ["a", "b"]),
        ("optimizers.adamw.b1=0.5", 0.5),
        ("LOCAL_FILES={'mbpp': {'test': '/m.jsonl'}}", {"mbpp": {"test": "/m.jsonl"}}),
    ],
)  # fmt: skip
def test_a_value_of_the_right_type_is_that_value(assignment, expected):
    assert _value(assignment) == expected


def test_a_macro_has_the_type_of_what_reads_it_through_other_macros(tmp_path):
    (tmp_path / "mine.gin").write_text("WHERE = 'x'\nMODEL_DIR = %WHERE\n")
    mine = str(tmp_path / "mine.gin")
    given = [f"{name}={value}" for name, value in TRAINING.items() if name != "MODEL_DIR"]
    gin_utils.parse_config([*FILES, "runs/finetune.gin", mine], [*given, "WHERE=7"])
    assert gin.query_parameter("%WHERE") == "7"
    with pytest.raises(ValueError, match=r"EVERY = 'ten'; expected int for trainer.train.log_peri"):
        _parse("trainer.train.log_period=%EVERY", "EVERY=ten")


def test_values_of_files_have_types_too(tmp_path):
    (tmp_path / "mine.gin").write_text("NUM_SAMPLES = '2'\n")
    with pytest.raises(ValueError, match=r"NUM_SAMPLES = '2'; expected int .* Did you mean 2\?"):
        _parse(files=[str(tmp_path / "mine.gin")])


def test_a_text_is_not_guessed_where_no_type_is_known():
    with pytest.raises(ValueError, match=r"OPTIMIZER = 'adamw' .* whether a text is expected"):
        _parse("OPTIMIZER=adamw")
    assert _value("OPTIMIZER='adamw'") == "adamw"


def test_what_our_modules_hold_is_there_without_a_file_that_imports_it(tmp_path):
    _parse("OPTIMIZER=@optimizers.adamw()", "optimizers.adamw.b2=0.9")
    assert str(gin.query_parameter("%OPTIMIZER")) == "@optimizers.adamw()"
    gin_utils.write_config(str(tmp_path))
    written = (tmp_path / "config.gin").read_text()
    gin.clear_config()
    gin_utils.parse_config([str(tmp_path / "config.gin")], [])
    assert gin.config_str() == written
    assert "OPTIMIZER = @optimizers.adamw()" in written
    with pytest.raises(ValueError, match=r"did you mean 'optimizers\.adamw'"):
        _parse("OPTIMIZER=@optimizers.adamww()")


@pytest.mark.parametrize("run", ["runs/finetune.gin", "runs/sample.gin"])
def test_every_macro_of_a_run_that_is_read_has_a_known_type(run):
    _parse(run=run)
    macros = [name for name, selector in gin.config._CONFIG if selector == gin_values.MACRO]
    unknown = {
        name
        for name in macros
        for _, annotation in gin_values._readers((name, gin_values.MACRO, "value"))
        if annotation is gin_values._UNKNOWN
    }
    assert unknown <= {"OPTIMIZER"}  # ours or T5X's


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (bool, [True], [1, "True", None]),
        (int, [3], [True, 3.0, "3"]),
        (float, [3, 0.5], [True, "0.5"]),
        (int | None, [3, None], ["none", 0.0]),
        (Literal["min", "max"], ["min"], ["minimum", None]),
        (tuple[int, ...], [(1, 2), [1, 2], ()], [(1, "2"), 3, (True,)]),
        (Sequence[str], [("a",), ["a"]], ["a", (1,)]),
        (str | Sequence[str], ["a", ("a",)], [1]),
        (Mapping[str, int], [{"a": 1}], [{"a": 1.5}, {1: 1}, "{}"]),
        (Callable[[int], int], [abs], ["abs", 3]),
        (str | np.dtype, ["float32"], ["bf61"]),
        (np.dtype, ["float32", "bfloat16"], ["bf61", 3]),
        (np.float32, [1, 0.5], [True, "0.5"]),
        (np.int32, [1], [0.5, True]),
        (pathlib.Path, ["/tmp/x", "2024"], [2024]),
        (frozenset[str], [("a",), ["a"]], ["a", (1,)]),
        (Hashable, ["a", 1], [{}]),
        (Any, [1, "x"], []),
    ],
)
def test_types_that_annotations_have(annotation, good, bad):
    assert all(gin_values.accepts(annotation, value) for value in good)
    assert not any(gin_values.accepts(annotation, value) for value in bad)


class Row(NamedTuple):
    """A user's class without an `__init__` of Python's."""

    width: int = 3


def users(name: str = None, kind: type[dict] | None = None, where: pathlib.Path = None):  # noqa: RUF013
    """Stands for a user's function: defaults of None that the annotations leave out."""


def test_functions_of_users_take_what_their_signatures_say():
    gin.external_configurable(Row, module="mine")
    gin.external_configurable(users, module="mine")
    gin.external_configurable(dict, "made", module="mine")
    assert _value("mine.Row.width=4") == 4
    assert _value("mine.users.name=None") is None
    assert _value("mine.users.name=7") == "7"
    assert _value("mine.users.where=2024") == "2024"
    assert str(_value("mine.users.kind=@mine.made")) == "@mine.made"
    with pytest.raises(ValueError, match=r"mine.Row.width = 'x'; expected int"):
        _parse("mine.Row.width=x")


def test_names_that_nothing_holds_are_short_errors():
    with pytest.raises(
        ValueError, match=r"^%MINE is read, but nothing sets it; .*--gin.MINE=VALUE"
    ) as error:
        _parse("BATCH_SIZE=%MINE")
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match=r"did you mean 'UniformCorruption'"):
        _parse("CORRUPTION=@UniformCoruption()")
