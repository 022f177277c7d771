"""Pretraining on the standard library: docstrings 80 %, source 20 % (arXiv 2401.17181, §4)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import seqio
import tensorflow as tf

from diffusion_t5x.data import preprocessors, sources
from tasks.features import output_features

OBJECTIVES: dict[str, Callable[..., tf.data.Dataset]] = {
    "prefix_lm": preprocessors.prefix_lm,
    "span_corruption": preprocessors.span_corruption,
}
# name -> (files of the documents, share of the mixture in percent)
CORPORA = {"prose": (sources.prose_files, 80.0), "source": (sources.source_files, 20.0)}

for _objective, _preprocessor in OBJECTIVES.items():
    _mixture = f"embedded_pretrain_{_objective}"
    if _mixture in seqio.MixtureRegistry.names():
        continue
    for _corpus, (_files, _) in CORPORA.items():
        seqio.TaskRegistry.add(
            f"embedded_{_corpus}_{_objective}",
            source=sources.EmbeddedDataSource(_files),
            preprocessors=[
                functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
                functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
                _preprocessor,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=output_features(),
        )
    seqio.MixtureRegistry.add(
        _mixture, [(f"embedded_{_corpus}_{_objective}", r) for _corpus, (_, r) in CORPORA.items()]
    )
