"""Sweeps: every combination of values of some settings, as decodings of each fine-tuned model."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import gin
from diffusion_t5x import gin_utils
from diffusion_t5x.experiments.experiment_graph import DEFAULT, Bindings, Experiment
from diffusion_t5x.experiments.stages import Stage
from diffusion_t5x.names import did_you_mean

# Name of a setting -> its values.
Axes: TypeAlias = Mapping[str, Sequence[Any]]


def parse(flags: Sequence[str]) -> Axes:
    """Reads flags such as 'NUM_STEPS=2,5,10'.

    Raises:
      ValueError: if one has no such form, names a setting again, or has a value twice or one that
        is neither a number nor a word.
    """
    axes: dict[str, list[Any]] = {}
    for flag in flags:
        match = re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.+)", flag)
        if not match:
            raise ValueError(f"--sweep={flag}; expected a setting and values: NUM_STEPS=2,5,10.")
        name, values = match[1], [_value(text.strip(), flag) for text in match[2].split(",")]
        if name in axes or len({repr(value) for value in values}) < len(values):
            raise ValueError(f"--sweep={flag}: {name}, or one of its values, is given twice.")
        axes[name] = values
    return axes


def _value(text: str, flag: str) -> Any:
    if not re.fullmatch(r"[\w.+-]+", text):
        raise ValueError(f"--sweep={flag}: {text!r} is neither a number nor a word.")
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def decodings(axes: Axes) -> dict[str, Bindings]:
    """Returns every combination, by a name such as 'num_steps_2_num_samples_8'."""
    combinations = itertools.product(*axes.values())
    named = (dict(zip(axes, values, strict=True)) for values in combinations)
    return {
        "_".join(f"{name.lower()}_{value}" for name, value in one.items()) or DEFAULT: one
        for one in named
    }


def sweep(
    experiment: Experiment,
    axes: Axes,
    tests: Mapping[str, Stage],
    gin_flags: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> Experiment:
    """Returns the experiment with the combinations of `axes` in place of its decodings.

    A method is swept over the settings that its gin files have: an AR method, which has no
    `NUM_STEPS`, over the others alone.

    Args:
      tests: Method's name -> a stage that measures it.
      gin_flags: `NAME=VALUE` each, as every stage gets them.
      search_paths: Further directories of gin files.

    Raises:
      ValueError: if a setting is one of no method's, a value is refused by the decoder, or two
        values make the same decoder.
    """
    found: dict[str, Bindings] = {}
    of_methods: dict[str, tuple[str, ...]] = {}
    unknown = set(axes)
    known: set[str] = set()
    for method, stage in tests.items():
        _parse(stage, {}, gin_flags, search_paths)
        known |= gin_utils.macros_set()
        own = {name: values for name, values in axes.items() if name in gin_utils.macros_set()}
        unknown -= set(own)
        of_method = decodings(own)
        decoders: dict[str, str] = {}
        for name, bindings in of_method.items():
            _parse(stage, bindings, gin_flags, search_paths)
            other = decoders.setdefault(_decoder(bindings), name)
            if other != name:
                raise ValueError(
                    f"--sweep: {name} and {other} decode alike with method {method!r}; sweep "
                    "settings of its DECODER."
                )
        found |= of_method
        of_methods[method] = tuple(of_method)
    if unknown:
        name = sorted(unknown)[0]
        raise ValueError(
            f"--sweep={name}=...: no gin file of the methods {', '.join(tests)} sets {name!r}; "
            f"{did_you_mean(name, sorted(known))}"
        )
    return dataclasses.replace(experiment, decoding=found, decodings_of=of_methods)


def _parse(
    stage: Stage, bindings: Bindings, gin_flags: Sequence[str], search_paths: Sequence[str]
) -> None:
    """Parses the configuration of a stage with other bindings."""
    gin.clear_config()
    assignments = [f"{name}={value!r}" for name, value in {**stage.bindings, **bindings}.items()]
    gin_utils.parse_config(stage.files, [*assignments, *gin_flags], search_paths)


def _decoder(bindings: Bindings) -> str:
    """Makes the configured decoder, and returns what it is."""
    try:
        return repr(gin.query_parameter("%DECODER").scoped_configurable_fn())
    except (TypeError, ValueError) as error:
        settings = ", ".join(f"{name}={value!r}" for name, value in bindings.items())
        raise ValueError(f"--sweep: {settings}: {error}") from error
