"""A toy task and a toy model for tests of the runtime."""

from __future__ import annotations

import functools

import seqio
import tensorflow as tf

from diffusion_t5x.checkpointing.checkpoints import CheckpointConfig, SaveCheckpointConfig
from diffusion_t5x.data.datasets import DatasetConfig
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.diffusion import DiffusionDecoder
from diffusion_t5x.models import Model
from diffusion_t5x.networks.config import TransformerConfig
from diffusion_t5x.networks.decoder_only import DecoderOnly
from diffusion_t5x.networks.encoder_decoder import EncoderDecoder
from diffusion_t5x.objectives import NextToken, StepUnrolledDenoising
from diffusion_t5x.objectives.corruption import UniformCorruption
from diffusion_t5x.runtime.partitioning import PjitPartitioner
from diffusion_t5x.training import optimizers
from diffusion_t5x.training.loop import train
from diffusion_t5x.training.train_step import Trainer
from tasks import metrics

VOCABULARY = seqio.ByteVocabulary()
VOCAB_SIZE = 264  # 259 rounded up, so that 8 devices may share the embedding
TASK = "toy_copy"
NUM_EXAMPLES = {"train": 50, "validation": 11, "test": 11}
LENGTHS = {"inputs": 6, "targets": 6}


def _examples(split, shuffle_files=False, seed=None):
    texts = [f"{split[0]}{number:03}" for number in range(NUM_EXAMPLES[split])]
    texts = tf.constant(texts, tf.string)
    return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": texts})


def register():
    """Registers the task, once."""
    if TASK not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            TASK,
            source=seqio.FunctionDataSource(_examples, splits=list(NUM_EXAMPLES)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={
                "inputs": seqio.Feature(VOCABULARY, add_eos=False),
                "targets": seqio.Feature(VOCABULARY, add_eos=True),
            },
            metric_fns=[metrics.exact_match],
        )
    return TASK


def register_with(name, *metric_fns, splits=("train", "validation")):
    """Registers the same task under another name with other metrics, once."""
    if name not in seqio.TaskRegistry.names():
        task = seqio.TaskRegistry.get(register())
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(_examples, splits=list(splits)),
            preprocessors=task.preprocessors,
            output_features=task.output_features,
            metric_fns=list(metric_fns),
        )
    return name


def dataset_cfg(split="train", batch_size=8, **kwargs):
    register()
    return DatasetConfig(
        **{
            "mixture_or_task_name": TASK,
            "task_feature_lengths": LENGTHS,
            "split": split,
            "batch_size": batch_size,
            "shuffle": split == "train",
            **kwargs,
        }
    )


def model(objective="diffusion", architecture="decoder_only", optimizer=None, **config):
    corruption = UniformCorruption(VOCABULARY.vocab_size)
    network = DecoderOnly if architecture == "decoder_only" else EncoderDecoder
    settings = {
        "vocab_size": VOCAB_SIZE,
        "embed_dim": 16,
        "num_heads": 4,
        "num_layers": 1,
        "head_dim": 4,
        "mlp_dim": 16,
        **config,
    }
    if objective == "diffusion":
        parts = (
            StepUnrolledDenoising(corruption),
            DiffusionDecoder(corruption, num_steps=2, num_samples=2),
        )
    else:
        parts = NextToken(), AutoregressiveDecoder()
    return Model(
        network(TransformerConfig(**settings)),
        *parts,
        VOCABULARY,
        optimizer or optimizers.adamw(),
        "NUM_REAL_TARGET_TOKENS",
    )


def run(model_dir, steps, the_model=None, learning_rate=1e-2, period=2, trainer=None, **kwargs):
    """`trainer.train` with everything small."""
    save = kwargs.pop("save", SaveCheckpointConfig(period=period))
    restore = kwargs.pop("restore", None)
    return train(
        model=the_model or model(),
        model_dir=str(model_dir),
        train_dataset_cfg=dataset_cfg(),
        partitioner=PjitPartitioner(),
        trainer_cls=functools.partial(
            Trainer, **{"learning_rate_fn": lambda step: learning_rate, **(trainer or {})}
        ),
        total_steps=steps,
        checkpoint_cfg=CheckpointConfig(save=save, restore=restore),
        log_period=2,
        **kwargs,
    )
