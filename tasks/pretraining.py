"""Pretraining corpora: mC4 with Python of The Stack, and the standard library's own text.

80 % of the examples are natural language, 20 % source code (arXiv 2401.17181, section 4.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import seqio
import tensorflow as tf

from diffusion_t5x.data import language_mixture, preprocessors
from diffusion_t5x.data.embedded import sources
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.files.local_files import LocalFilesDataSource
from diffusion_t5x.data.tfds_source import TfdsDataSource

from .features import register

OBJECTIVES: dict[str, Callable[..., tf.data.Dataset]] = {
    "prefix_lm": preprocessors.prefix_lm,
    "span_corruption": preprocessors.span_corruption,
}
PROSE, SOURCE = 80.0, 20.0  # percent
MC4_TFDS = "c4/multilingual:3.1.0"
_MC4_CODES = """
    af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy ga
    gd gl gu ha haw hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky la lb
    lo lt lv mg mi mk ml mn mr ms mt my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl sm sn so
    sq sr st su sv sw ta te tg th tr uk ur uz vi xh yi yo zh zh-Latn zu
"""
MC4_LANGUAGES = tuple(_MC4_CODES.split())


def mc4_name(language: str) -> str:
    """Returns the name of a language's source, such as 'mc4_bg_Latn' for 'bg-Latn'."""
    return f"mc4_{language.replace('-', '_')}"


def _documents(name: str, field: str, **kwargs: Any) -> LocalFilesDataSource:
    return LocalFilesDataSource(
        name,
        lambda settings: readers.Documents(settings.text_field or field, settings.documents),
        **kwargs,
    )


def _mc4(language: str) -> LocalFilesDataSource:
    return _documents(
        mc4_name(language),
        "text",
        otherwise=TfdsDataSource(
            MC4_TFDS, splits={"train": language, "validation": f"{language}-validation"}
        ),
        to_record=lambda example: {"text": example["text"]},
    )


def _stack_files() -> Mapping[str, str]:
    raise ValueError(
        "TFDS lacks 'the_stack'; set LOCAL_FILES = {'the_stack': {'train': FILES, 'validation': "
        "FILES}} to its Parquet or JSON lines files of Python, e.g. "
        "'/data/the-stack/data/python/*.parquet', whose programs are in 'content'."
    )


def _register(corpus: str, source: seqio.DataSource, objective: str) -> str:
    """Registers the task of a corpus for a pretraining objective."""
    steps = [
        functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        OBJECTIVES[objective],
    ]
    return register(f"{corpus}_{objective}", source, steps)


def _mix(name: str, rates: list[tuple[str, float | Callable[[seqio.Task], float]]]) -> str:
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, rates)
    return name


_EMBEDDED = {
    "embedded_prose": sources.EmbeddedDataSource(sources.prose_files),
    "embedded_source": sources.EmbeddedDataSource(sources.source_files),
}
_MIXTURE = language_mixture.LanguageMixture()
_MC4 = {language: _mc4(language) for language in _MIXTURE.choose(MC4_LANGUAGES)}
_STACK = _documents(
    "the_stack", "content", default_files=_stack_files, splits=("train", "validation")
)

for _objective in OBJECTIVES:
    _prose, _source = (_register(name, files, _objective) for name, files in _EMBEDDED.items())
    _mix(f"embedded_pretrain_{_objective}", [(_prose, PROSE), (_source, SOURCE)])
    _languages = [_register(mc4_name(name), _MC4[name], _objective) for name in _MC4]
    _mc4_mixture = _mix(f"mc4_{_objective}", [(name, _MIXTURE.rate) for name in _languages])
    _python = _register("the_stack", _STACK, _objective)
    _mix(f"pretrain_{_objective}", [(_mc4_mixture, PROSE), (_python, SOURCE)])
