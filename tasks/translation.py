"""Translation of CLDR's dates, durations, amounts, units and names, between any two locales."""

from __future__ import annotations

import functools

import seqio

from diffusion_t5x.data import sources
from diffusion_t5x.data.embedded_translation import parse_locale
from tasks import metrics
from tasks.features import output_features


def register_translation(source_locale: str, target_locale: str) -> str:
    """Registers `embedded_translation_{source}_{target}` once, and returns its name.

    Raises:
      ValueError: if CLDR lacks one of the locales.
    """
    parse_locale(source_locale), parse_locale(target_locale)
    name = f"embedded_translation_{source_locale}_{target_locale}"
    if name not in seqio.TaskRegistry.names():
        files = functools.partial(sources.translation_files, source_locale, target_locale)
        seqio.TaskRegistry.add(
            name,
            source=sources.EmbeddedDataSource(files),
            preprocessors=[
                functools.partial(
                    seqio.preprocessors.rekey, key_map={"inputs": "source", "targets": "target"}
                ),
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=output_features(),
            metric_fns=[metrics.exact_match, metrics.bleu],
        )
    return name


register_translation("en", "fr")
