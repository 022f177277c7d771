"""Translation: WMT14, and dates, durations, amounts, units and names of CLDR in any locales."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import seqio

from diffusion_t5x.data import preprocessors
from diffusion_t5x.data.embedded import sources
from diffusion_t5x.data.embedded.translation import parse_locale
from diffusion_t5x.data.files import readers
from diffusion_t5x.data.files.local_files import LocalFiles, LocalFilesDataSource
from diffusion_t5x.data.tfds_source import TfdsDataSource

from . import metrics
from .features import register

WMT14_TFDS = "wmt14_translate/fr-en:1.0.0"
WMT14_LANGUAGES = ("en", "fr")


def _wmt14_reader(settings: LocalFiles) -> readers.ParallelText:
    return readers.ParallelText(
        languages=WMT14_LANGUAGES, columns=tuple(settings.columns or WMT14_LANGUAGES)
    )


def _register(
    name: str,
    source: seqio.DataSource,
    inputs: str,
    targets: str,
    metric_fns: Sequence[Callable[..., Any]],
) -> str:
    """Registers a task that translates one field of a source into another."""
    rekey = functools.partial(
        seqio.preprocessors.rekey, key_map={"inputs": inputs, "targets": targets}
    )
    return register(name, source, [rekey, preprocessors.tokenize], metric_fns=metric_fns)


def register_translation(source_locale: str, target_locale: str) -> str:
    """Registers `embedded_translation_{source}_{target}`, and returns its name.

    Args:
      source_locale: The CLDR name of the source locale, e.g. 'en'.
      target_locale: The CLDR name of the target locale, e.g. 'fr'.

    Raises:
      ValueError: if CLDR lacks one of the locales.
    """
    parse_locale(source_locale), parse_locale(target_locale)
    files = functools.partial(sources.translation_files, source_locale, target_locale)
    return _register(
        f"embedded_translation_{source_locale}_{target_locale}",
        sources.EmbeddedDataSource(files),
        "source",
        "target",
        [metrics.exact_match, metrics.bleu],
    )


EMBEDDED = register_translation("en", "fr")

_WMT14 = LocalFilesDataSource(
    "wmt14",
    _wmt14_reader,
    TfdsDataSource(WMT14_TFDS, splits=("train", "validation", "test")),
)
for _inputs, _targets in (WMT14_LANGUAGES, WMT14_LANGUAGES[::-1]):
    _register(f"wmt14_{_inputs}_{_targets}", _WMT14, _inputs, _targets, [metrics.bleu])
