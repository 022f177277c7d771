"""Adapts a causal language model to diffusion by two recipes, beside the same network from scratch.

python -m benchmarks.adapt --model=smollm2.gguf --output=runs/adapt_smollm2

Each stage is finished once: what was stopped goes on, and what is there is taken as it is.

1. It is the same model: its greedy continuation of 'The capital of France is', and its perplexity
   of a paragraph.
2. Three trainings of the same steps on the standard library's own text, by the model's tokenizer.
3. Of each, and of the model before any step: the denoising loss of held-out text while it was
   trained, a bound of its perplexity (`likelihood.any_order_bound`, the mean over texts with its
   standard error over draws), and canvases step by step.
4. With libtpu installed: what a step of 512 + 512 tokens takes on four TPU v5p by the compiler's
   account, and so how long the whole job is.

`results.json`, `results.md` and `curves.png` are written to OUTPUT.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks import decode_quality
from diffusion_t5x import models, sample, train
from diffusion_t5x.data import datasets
from diffusion_t5x.experiments.report import save_figure
from diffusion_t5x.objectives import likelihood
from diffusion_t5x.runtime import resumable, terminal
from diffusion_t5x.runtime.files import write_atomically
from diffusion_t5x.training.metric_logs import read_metrics

MODEL = "models/hugging_face.gin"
AUTOREGRESSIVE = "objectives/autoregressive.gin"
QUESTION = "The capital of France is"
# Written for this purpose, so that no model has learnt it.
PARAGRAPH = (
    "A model that writes from left to right commits itself with every word. One that denoises may "
    "look at the end of a sentence before it settles the beginning, and change its mind about "
    "both. The price is that it reads the whole canvas again at every step, and that it must learn "
    "to doubt what it has written."
)
TASK = "embedded_pretrain_prefix_lm"
LENGTHS = {"inputs": 32, "targets": 32}
WARMUP = 10
SCHEDULE = "optimizers.create_learning_rate_scheduler"
# Tokens of the whole job: of a small trial, and of DiffuLLaMA's 7B (arXiv 2410.17891, section 4.1).
JOBS = (1e9, 65e9)
JOB_LENGTHS, JOB_BATCH = {"inputs": 512, "targets": 512}, 64
JOB_TOPOLOGY = "v5p:2x2x1"  # four chips, the least that libtpu compiles for


@dataclasses.dataclass(frozen=True)
class Method:
    """One training: gin files of its objective, the height of its learning rate, and its start."""

    files: tuple[str, ...]
    rate: float
    from_model: bool = True
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# One denoising pass a step: in so few, more texts are worth more than the unrolled pass.
ONE_PASS = {"objectives.StepUnrolledDenoising.num_unrolls": 0}
# The two best of docs/adapt.md's recipes, and fresh parameters, which take larger steps.
METHODS: Mapping[str, Method] = {
    "direct": Method(("objectives/diffusion.gin",), 0.005, bindings=ONE_PASS),
    "AR beside": Method(
        ("objectives/diffusion.gin",), 0.005, bindings={**ONE_PASS, "NEXT_TOKEN_WEIGHT": 1.0}
    ),
    "scratch": Method(("objectives/diffusion.gin",), 0.01, from_model=False, bindings=ONE_PASS),
}


def arguments(files: Sequence[str], bindings: Mapping[str, Any]) -> list[str]:
    """Returns a command's arguments of gin files and bindings."""
    given = [f"--gin_file={file}" for file in files]
    return [*given, *(f"--gin.{name}={value!r}" for name, value in bindings.items())]


class Adaptation:
    """The stages of one comparison, in a directory.

    Attributes:
      model: Path of the language model.
      output: Directory of everything.
      steps: Steps of each training.
      batch_size: Examples per step.
      num_texts: Held-out texts of the bound.
      num_draws: Passes for each of them.
    """

    def __init__(
        self, model: str, output: epath.Path, steps: int, batch_size: int,
        num_texts: int, num_draws: int,
    ):  # fmt: skip
        """Remembers the settings; nothing is read."""
        self.model, self.output, self.steps = model, output, steps
        self.batch_size, self.num_texts, self.num_draws = batch_size, num_texts, num_draws

    def stage(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns what a stage came to, now or before, and prints it as a line."""
        path = self.output / f"{name.replace(' ', '_')}.json"
        method = str(METHODS.get(name.partition("-")[2]))
        sizes = (self.steps, self.batch_size, self.num_texts, self.num_draws)
        key = resumable.digest([self.model, *sizes, method])
        found = resumable.load(path, key)
        if found is None:
            started = time.monotonic()
            found = {**make(), "seconds": round(time.monotonic() - started, 1)}
            resumable.save(path, key, found)
        shown = {field: value for field, value in found.items() if field != "digest"}
        print(json.dumps({"stage": name, **shown}), flush=True)
        return shown

    def load(self, objective: Sequence[str], checkpoint: str) -> tuple[models.Model, Any]:
        """Returns the model of an objective, and the parameters of a checkpoint."""
        model = decode_quality.make_model([MODEL, *objective], [f"HF_MODEL={self.model!r}"])
        return model, decode_quality.restore(model, checkpoint)

    def _run(self, name: str) -> epath.Path:
        """Returns the directory of a method's training."""
        return self.output / name.replace(" ", "_")

    def same_model(self) -> dict[str, Any]:
        """Continues the question greedily, and measures the perplexity of the paragraph."""
        bindings = {
            "HF_MODEL": self.model,
            "CHECKPOINT_PATH": self.model,
            "INPUTS": QUESTION,
            "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 8},
        }
        files = (MODEL, AUTOREGRESSIVE, "runs/sample.gin")
        with contextlib.redirect_stdout(io.StringIO()):
            [continuation] = sample.main(arguments(files, bindings))
        model, params = self.load([AUTOREGRESSIVE], self.model)
        first, *rest = model.input_vocabulary.encode(PARAGRAPH)
        batch = {
            "encoder_input_tokens": jnp.array([[first]]),
            "decoder_target_tokens": jnp.array([rest]),
            "decoder_input_tokens": jnp.array([[0, *rest[:-1]]]),
        }
        score = float(jax.jit(model.score_batch)(params, batch)[0])
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "question": QUESTION,
            "continuation": continuation,
            "paragraph_tokens": len(rest),
            "paragraph_perplexity": float(np.exp(-score / len(rest))),
        }

    def train(self, name: str) -> dict[str, Any]:
        """Trains a method, in a process of its own; a run that was stopped goes on."""
        method = METHODS[name]
        run = "runs/adapt.gin" if method.from_model else "runs/pretrain.gin"
        bindings: dict[str, Any] = {
            "HF_MODEL": self.model,
            "MODEL_DIR": str(self._run(name)),
            "MIXTURE_OR_TASK_NAME": TASK,
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "BATCH_SIZE": self.batch_size,
            "TRAIN_STEPS": self.steps,
            "CHECKPOINT_PERIOD": max(self.steps // 2, 1),
            "EVAL_PERIOD": max(self.steps // 8, 1),
            "EVAL_STEPS": 2,
            "trainer.train.log_period": max(self.steps // 20, 1),
            "trainer.Trainer.clip_norm": 1.0,
            f"{SCHEDULE}.factors": "constant * linear_warmup * cosine_decay",
            f"{SCHEDULE}.base_learning_rate": method.rate,
            f"{SCHEDULE}.warmup_steps": WARMUP,
            f"{SCHEDULE}.steps_per_cycle": self.steps,
            **method.bindings,
        }
        if method.from_model:
            bindings["INITIAL_CHECKPOINT_PATH"] = self.model
        command = [sys.executable, "-m", "diffusion_t5x.train"]
        command += arguments((MODEL, *method.files, run), bindings)
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = read_metrics(str(self._run(name)))
        held_out = {
            line["step"]: line["cross_entropy/unroll_0"]
            for line in lines
            if line["split"] == "training_eval"
        }
        return {
            "steps": list(held_out),
            "held_out_loss": list(held_out.values()),
            "training_seconds": max(line.get("seconds", 0.0) for line in lines),
        }

    def texts(self, model: models.Model) -> list[datasets.Batch]:
        """Returns held-out texts, of which only the canvases' text counts."""
        config = datasets.DatasetConfig(
            TASK, LENGTHS, "validation", self.batch_size, module="diffusion_t5x.tasks"
        )
        count = -(-self.num_texts // self.batch_size)
        converter = model.FEATURE_CONVERTER_CLS
        return list(datasets.get_eval_batches(config, converter, num_batches=count))

    def perplexity(self, objective: Sequence[str], checkpoint: str) -> dict[str, Any]:
        """Measures bits per token of held-out text: a bound, or exactly for an AR objective."""
        model, params = self.load(objective, checkpoint)
        prior = getattr(getattr(model.objective, "corruption", None), "prior", None)

        @jax.jit
        def score(params: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
            targets = batch["decoder_target_tokens"]
            weights = (targets > 0).astype(jnp.float32)
            if prior is None:
                exact = model.score_batch(params, {**batch, "decoder_loss_weights": weights})
                return exact, jnp.zeros_like(exact)
            network = model.bind(params, batch)
            return likelihood.any_order_bound(network, prior, targets, weights, rng, self.num_draws)

        scores, errors, tokens = [], [], 0
        for number, batch in enumerate(self.texts(model)):
            rng = jax.random.fold_in(jax.random.PRNGKey(0), number)
            found, error = jax.device_get(score(params, batch, rng))
            scores += found.tolist()
            errors += error.tolist()
            tokens += int((batch["decoder_target_tokens"] > 0).sum())
        bits = -sum(scores) / tokens / np.log(2)
        error = float(np.sqrt(np.square(errors).sum())) / tokens / np.log(2)
        return {"bits_per_token": bits, "error": error, "perplexity": 2**bits, "tokens": tokens}

    def canvases(self, name: str) -> dict[str, Any]:
        """Denoises a canvas after the question, and keeps each step."""
        bindings = {
            "HF_MODEL": self.model,
            "CHECKPOINT_PATH": str(self._run(name)),
            "INPUTS": QUESTION,
            "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 16},
            "SHOW_TRAJECTORY": True,
        }
        printed = io.StringIO()
        files = (MODEL, *METHODS[name].files, "runs/sample.gin")
        with contextlib.redirect_stdout(printed):
            sample.main(arguments(files, bindings))
        return {"canvases": printed.getvalue().splitlines()}

    def whole_job(self) -> dict[str, Any]:
        """Compiles a training step for four TPU v5p, and says how long the whole job takes them."""
        from benchmarks.compiler import compiled_program

        bindings = {
            "HF_MODEL": self.model,
            "MODEL_DIR": str(self.output / "whole_job"),
            "MIXTURE_OR_TASK_NAME": TASK,
            "TASK_FEATURE_LENGTHS": JOB_LENGTHS,
            "BATCH_SIZE": JOB_BATCH,
            "TRAIN_STEPS": 1,
            "config.TransformerConfig.dtype": "bfloat16",
            "config.TransformerConfig.scan_layers": True,
        }
        files = (MODEL, METHODS["direct"].files[0], "runs/pretrain.gin")
        argv = [*arguments(files, bindings), "--dry_run", f"--topology={JOB_TOPOLOGY}"]
        with contextlib.redirect_stdout(sys.stderr):
            report = train.main(argv)
        seconds = compiled_program.estimated_seconds(report.compiled, unknown_trips=1)
        tokens = JOB_BATCH * sum(JOB_LENGTHS.values())
        hours = {f"{job:.1e}": job / tokens * seconds / 3600 for job in JOBS}
        return {"seconds_per_step": seconds, "tokens_per_step": tokens, "hours": hours,
                "bytes": report.total}  # fmt: skip

    def run(self) -> None:
        """Runs the stages that are not finished, and writes the table and the plot."""
        results = {"same_model": self.stage("same_model", self.same_model)}
        for name in METHODS:
            results[f"train-{name}"] = self.stage(
                f"train-{name}", lambda name=name: self.train(name)
            )
        results["bits"] = {
            "model, autoregressive": self.stage(
                "bits-autoregressive", lambda: self.perplexity([AUTOREGRESSIVE], self.model)
            ),
            "model, as if it denoised": self.stage(
                "bits-unadapted",
                lambda: self.perplexity(next(iter(METHODS.values())).files, self.model),
            ),
        }
        for name, method in METHODS.items():
            checkpoint = str(self._run(name))
            results["bits"][name] = self.stage(
                f"bits-{name}",
                lambda method=method, at=checkpoint: self.perplexity(method.files, at),
            )
            results[f"canvases-{name}"] = self.stage(
                f"canvases-{name}", lambda name=name: self.canvases(name)
            )
        if importlib.util.find_spec("libtpu"):
            results["whole_job"] = self.stage("whole_job", self.whole_job)
        self.write(results)

    def write(self, results: Mapping[str, Any]) -> None:
        """Writes `results.json`, `results.md` and `curves.png`, and prints the table."""
        header = [
            "",
            "held-out loss, first",
            "last",
            "bits per token",
            "±",
            "perplexity",
            "seconds",
        ]
        body: list[list[Any]] = []
        for name, bits in results["bits"].items():
            training = results.get(f"train-{name}")
            losses = training["held_out_loss"] if training else [None]
            seconds = training["training_seconds"] if training else None
            body.append([name, losses[0], losses[-1], bits["bits_per_token"], bits["error"] or None,
                         bits["perplexity"], seconds])  # fmt: skip
        write_atomically(self.output / "results.json", json.dumps(results, indent=1) + "\n")
        write_atomically(self.output / "results.md", terminal.markdown(header, body))
        self._plot(results)
        terminal.print_table(header, body, title=f"{self.steps} steps of {self.batch_size} texts")
        for name in METHODS:
            print(f"\n{name}:", *results[f"canvases-{name}"]["canvases"], sep="\n")
        print(f"\n{self.output}: results.json, results.md, curves.png")

    def _plot(self, results: Mapping[str, Any]) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 3.6))
        for name in METHODS:
            training = results[f"train-{name}"]
            axes.plot(training["steps"], training["held_out_loss"], marker="o", label=name)
        axes.set_xlabel("steps")
        axes.set_ylabel("denoising loss of held-out text, nats per token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        save_figure(figure, self.output / "curves.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison; `argv` replaces the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a .gguf file, or a directory with safetensors")
    add("--output", default="runs/adapt", type=epath.Path)
    add("--steps", type=int, default=120, help="of each training")
    add("--batch_size", type=int, default=8)
    add("--texts", type=int, default=16, help="held-out texts of the bound")
    add("--draws", type=int, default=16, help="passes for each of them")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    Adaptation(args.model, args.output, args.steps, args.batch_size, args.texts, args.draws).run()


if __name__ == "__main__":
    main()
