"""Prints losses of twenty training steps and a digest of decoded text, for each way to train.

python -m tests.tools.fingerprint                  # all; minutes
python -m tests.tools.fingerprint diffusion_blocks  # those whose name contains the word

A change that only moves code prints the same digits before and after, on one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from diffusion_t5x import infer, train
from diffusion_t5x.training.metric_logs import read_metrics

TINY, ENCODER_DECODER, FAST = (
    "models/tiny.gin",
    "models/encoder_decoder/tiny.gin",
    "decoders/fast.gin",
)
WAYS = {
    "autoregressive": (TINY, "objectives/autoregressive.gin", ()),
    "diffusion": (TINY, "objectives/diffusion.gin", ()),
    "encoder_decoder/autoregressive": (ENCODER_DECODER, "objectives/autoregressive.gin", ()),
    "encoder_decoder/diffusion": (ENCODER_DECODER, "objectives/diffusion.gin", ()),
    "diffusion_cached_prefix": (TINY, "objectives/diffusion_cached_prefix.gin", (FAST,)),
    "diffusion_blocks": (TINY, "objectives/diffusion_blocks.gin", (FAST,)),
}
COMMON = [
    "--gin.MIXTURE_OR_TASK_NAME=embedded_translation_en_fr",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 24}",
    "--gin.BATCH_SIZE=16",
]
TRAINING = [
    "--gin_file=runs/pretrain.gin", "--gin.TRAIN_STEPS=20", "--gin.CHECKPOINT_PERIOD=20",
    "--gin.EVAL_PERIOD=10", "--gin.EVAL_STEPS=1", "--gin.PACK=False",
    "--gin.optimizers.create_learning_rate_scheduler.warmup_steps=10",
    "--gin.trainer.train.log_period=1",
]  # fmt: skip


def digest(text: str) -> str:
    """Returns twelve hex digits that name a text."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def fingerprint(way: str, directory: pathlib.Path) -> dict[str, object]:
    """Trains and decodes one way, and returns its last losses and two digests."""
    model, objective, decoder = WAYS[way]
    files = [f"--gin_file={model}", f"--gin_file={objective}"]
    common = [*COMMON, *(["--gin.BLOCK_LENGTH=8"] if way == "diffusion_blocks" else [])]
    train.main([*files, *TRAINING, *common, f"--gin.MODEL_DIR={directory}/run"])
    losses = [line["loss"] for line in read_metrics(f"{directory}/run")]
    infer.main([
        *files, "--gin_file=runs/infer.gin", *(f"--gin_file={file}" for file in decoder), *common,
        f"--gin.CHECKPOINT_PATH={directory}/run", f"--gin.INFER_OUTPUT_DIR={directory}/infer",
        "--gin.inference.infer.num_shards=300",
    ])  # fmt: skip
    # The texts alone: notes beside them hold a digest of the settings, with the directory's name.
    texts = "".join(file.read_text() for file in sorted((directory / "infer").glob("embedded_*")))
    return {"losses": losses[-3:], "all": digest(json.dumps(losses)), "decoded": digest(texts)}


def main() -> None:
    """Prints a line for each way whose name contains a word of the command line."""
    for way in WAYS:
        if len(sys.argv) == 1 or any(word in way for word in sys.argv[1:]):
            with tempfile.TemporaryDirectory() as directory:
                print(way, json.dumps(fingerprint(way, pathlib.Path(directory))), flush=True)


if __name__ == "__main__":
    main()
