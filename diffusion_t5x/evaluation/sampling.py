"""Decoding of texts given on the command line, with the canvas of each denoising step."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.data.chat import message_tokens
from diffusion_t5x.data.detokenize import detokenize
from diffusion_t5x.evaluation.compiled_model import Predictor, restorer
from diffusion_t5x.interfaces import FIXED_FEATURE
from diffusion_t5x.models import Model
from diffusion_t5x.runtime.partitioning import PjitPartitioner


def show_step(tokens: np.ndarray, vocabulary: Any, masks: Sequence[int] = ()) -> str:
    """Renders a canvas token by token.

    '·' stands for what cannot be printed, '_' for padding, '|' for the end of text, '□' for
    `masks`, the tokens that only noise has.
    """
    marks = {0: "_", vocabulary.eos_id: "|", **dict.fromkeys(masks, "□")}
    pieces = (marks.get(int(t)) or vocabulary.decode([int(t)]) or "·" for t in tokens)
    text = "".join(pieces).replace("\n", "⏎")
    # Spaces of every width are shown; what would move the cursor is not.
    shown = (char.isprintable() or unicodedata.category(char) == "Zs" for char in text)
    return "".join(char if show else "·" for char, show in zip(text, shown, strict=True))


def parse_template(template: str, vocabulary: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads a text with holes, such as `'def f(x):\\n<8>\\n    return y'`.

    `<8>` is a hole of 8 tokens, of which the text that fills it may use fewer; `<*>`, at the end
    of a text, is a hole to the end of the canvas. `\\<8>` is no hole, but the text `<8>`. A text
    that does not end in `<*>` ends with its last character: nothing is decoded after it.

    Returns:
      Tokens, and which positions are fixed, int32 0 or 1; both `[length]`.

    Raises:
      ValueError: if there is no hole, one has no token, `<*>` is not at the end, or the text does
        not fit.
    """
    tokens: list[int] = []
    fixed: list[int] = []
    pieces = re.split(r"(?<!\\)<(\d+|\*)>", template)
    if len(pieces) == 1:
        raise ValueError(
            f"FIXED = {template!r} has no hole; expected one, such as <8> for 8 tokens, or <*> at "
            "the end for all that follows."
        )
    if "*" in pieces[1:-2:2] or (pieces[-2] == "*" and pieces[-1]):
        raise ValueError(f"FIXED = {template!r}: <*> reaches to the end; nothing may follow it.")
    for number, piece in enumerate(pieces):
        hole = number % 2 == 1
        if hole and piece == "0":
            raise ValueError(f"FIXED = {template!r}: <0> is no hole; expected at least 1 token.")
        if piece == "*":
            break
        text = re.sub(r"\\(<(?:\d+|\*)>)", r"\1", piece)
        new = [0] * min(int(piece), length + 1) if hole else vocabulary.encode(text)
        tokens += new
        fixed += [int(not hole)] * len(new)
    else:
        end = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
        tokens += end
        fixed += [1] * max(len(end), length - len(fixed))
    if len(tokens) + (pieces[-2] == "*") > length:
        raise ValueError(
            f"FIXED = {template!r} has {len(tokens)} tokens with its holes and its end; at most "
            f"{length} fit (TASK_FEATURE_LENGTHS['targets'])."
        )
    rows = np.zeros((2, length), np.int32)
    rows[0, : len(tokens)] = tokens
    rows[1, : len(fixed)] = fixed
    return rows[0], rows[1]


def _templates(fixed: Any, count: int) -> list[str]:
    """Returns a template for each of `count` texts."""
    templates = [fixed] * count if isinstance(fixed, str) else fixed
    if (
        not isinstance(templates, Sequence)
        or not all(isinstance(text, str) for text in templates)
        or len(templates) != count
    ):
        raise ValueError(
            f"FIXED = {fixed!r}; expected a text with holes, or a tuple of as many as there are "
            f"INPUTS, {count}."
        )
    return list(templates)


def sample(
    *,
    model: Model,
    restore_checkpoint_cfg: RestoreCheckpointConfig,
    partitioner: PjitPartitioner,
    inputs: str | Sequence[str],
    task_feature_lengths: dict[str, int],
    show_trajectory: bool = False,
    as_chat: bool = False,
    fixed: str | Sequence[str] | None = None,
    random_seed: int = 0,
    dry_run: bool = False,
) -> list[str]:
    """Decodes `inputs` and prints each with its result.

    Args:
      restore_checkpoint_cfg: One checkpoint.
      partitioner: Devices and sharding. The texts are one batch, padded with rows of zeros to a
        multiple of the data-parallel shards; what the padding decodes to is dropped.
      task_feature_lengths: Maximum tokens of 'inputs' and 'targets'.
      show_trajectory: Also print the best sample's canvas at every step.
      as_chat: Each text is a user's message, which the chat template renders.
      fixed: A text with holes that decoding fills, see `parse_template`; one for all of `inputs`,
        or one for each. What is printed is the completed text.
      random_seed: Seed of decoding.
      dry_run: Only read the checkpoint.

    Returns:
      The decoded texts.

    Raises:
      ValueError: if there is nothing to decode, a text is too long, the decoder has no canvas to
        show, or positions cannot be fixed.
      FileNotFoundError: if there is no checkpoint.
    """
    if isinstance(inputs, str):
        inputs = (inputs,)
    if not isinstance(inputs, Sequence) or not all(isinstance(text, str) for text in inputs):
        raise ValueError(
            f"INPUTS = {inputs!r}; expected a text or a tuple of texts, quoted where gin would "
            "read it as a number, as in --gin.INPUTS=\"'2024'\"."
        )
    if not inputs:
        raise ValueError("INPUTS = (); expected at least one text to decode.")
    vocabulary = model.input_vocabulary
    length = task_feature_lengths["inputs"]
    prefixes = np.zeros((len(inputs), length), np.int32)
    for row, text in enumerate(inputs):
        tokens = message_tokens(text, vocabulary) if as_chat else vocabulary.encode(text)
        if len(tokens) > length:
            raise ValueError(f"{text!r} has {len(tokens)} tokens; at most {length} fit.")
        prefixes[row, : len(tokens)] = tokens
    targets = np.zeros((len(prefixes), task_feature_lengths["targets"]), np.int32)
    batch = {
        "encoder_input_tokens": prefixes,
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
    }
    if fixed is not None:
        rows = [
            parse_template(text, model.output_vocabulary, targets.shape[1])
            for text in _templates(fixed, len(inputs))
        ]
        batch["decoder_target_tokens"], batch[FIXED_FEATURE] = map(
            np.stack, zip(*rows, strict=True)
        )
    _, path = select_checkpoints(restore_checkpoint_cfg)[-1]
    params = restorer(model, partitioner, restore_checkpoint_cfg)(path)
    if dry_run:
        return []
    shards = partitioner.num_data_shards
    batch_size = -(-len(inputs) // shards) * shards
    predictor = Predictor(
        model, partitioner, random_seed, batch_size, return_trajectory=show_trajectory
    )
    predictions, _ = predictor(params, batch, 0)
    outputs = []
    for text, prediction in zip(inputs, predictions, strict=True):
        output = detokenize(prediction.tokens, model.output_vocabulary)
        outputs.append(output)
        print(f"{text}  ->  {output}")
        for step, canvas in enumerate(prediction.aux["trajectory"] if show_trajectory else ()):
            shown = show_step(canvas, model.output_vocabulary, model.objective.forbidden)
            print(f"  step {step:>3}: {shown}")
    return outputs
