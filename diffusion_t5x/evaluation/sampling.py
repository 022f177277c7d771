"""Decoding of texts given on the command line, with the canvas of each denoising step."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_t5x.checkpointing.checkpoints import RestoreCheckpointConfig, select_checkpoints
from diffusion_t5x.data.chat import message_tokens
from diffusion_t5x.data.detokenize import detokenize
from diffusion_t5x.evaluation.compiled_model import Predictor, restorer
from diffusion_t5x.models import Model
from diffusion_t5x.runtime.partitioning import PjitPartitioner


def show_step(tokens: np.ndarray, vocabulary: Any) -> str:
    """Renders a canvas token by token: '·' for unprintable, '_' padding, '|' end of text."""
    marks = {0: "_", vocabulary.eos_id: "|"}
    pieces = (marks.get(int(t)) or vocabulary.decode([int(t)]) or "·" for t in tokens)
    text = "".join(pieces).replace("\n", "⏎")
    # Spaces of every width are shown; what would move the cursor is not.
    shown = (char.isprintable() or unicodedata.category(char) == "Zs" for char in text)
    return "".join(char if show else "·" for char, show in zip(text, shown, strict=True))


def sample(
    *,
    model: Model,
    restore_checkpoint_cfg: RestoreCheckpointConfig,
    partitioner: PjitPartitioner,
    inputs: str | Sequence[str],
    task_feature_lengths: dict[str, int],
    show_trajectory: bool = False,
    as_chat: bool = False,
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
      random_seed: Seed of decoding.
      dry_run: Only read the checkpoint.

    Returns:
      The decoded texts.

    Raises:
      ValueError: if there is nothing to decode, a text is too long, or the decoder has no canvas
        to show.
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
            print(f"  step {step:>3}: {show_step(canvas, model.output_vocabulary)}")
    return outputs
