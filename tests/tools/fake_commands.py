"""Stand-ins for the commands of an experiment, which write what the real ones write."""

import json
import pathlib

from diffusion_t5x.experiments import report
from diffusion_t5x.runtime.files import write_atomically

EXACT = {"autoregressive": 0.99, "diffusion": 0.8, "ar2diff_0": 0.85, "ar2diff_N": 0.9}


def binding_values(argv):
    bindings = dict(flag.removeprefix("--gin.").split("=", 1) for flag in argv)
    return {name: value.strip("'") for name, value in bindings.items()}


class FakeCommands:
    """Writes what the commands write; is killed at the stage `die_at`, counted from 1."""

    def __init__(self, die_at=None):
        self.calls = []
        self.die_at = die_at
        self.commands = {
            "train": self.train,
            "eval": self.eval,
            "sample": self.sample,
        }

    def _count(self, directory):
        self.calls.append(directory)
        if len(self.calls) == self.die_at:
            raise KeyboardInterrupt

    def train(self, argv):
        values = binding_values(argv)
        self._count(values["MODEL_DIR"])
        lines = [
            {"step": step, "split": "train", "seconds": float(step), "loss": 2.5}
            for step in (10, 20)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(pathlib.Path(values["MODEL_DIR"]) / "metrics.jsonl", text)

    def eval(self, argv):
        values = binding_values(argv)
        output = pathlib.Path(values["EVAL_OUTPUT_DIR"])
        self._count(str(output))
        seed, name = int(values["RANDOM_SEED"]), values["MIXTURE_OR_TASK_NAME"]
        exact = EXACT.get(output.parent.name, 0.5) - 0.02 * seed
        metrics = {
            "exact_match": exact,
            **{metric: 100 * exact for metric in ("bleu", "f1", "pass_at_1")},
            "examples": 256,
            "decode_seconds_per_example": 0.5,
            "decode_passes_per_example": 8.0,
        }
        row = {"step": 10, "task": name, "metrics": metrics}
        best = {"step": 10, "task": name, "metric": "exact_match", "value": exact}
        results = {"rows": [row], "best": best if "BEST_METRIC" in values else None}
        print("a table of results")
        write_atomically(output / "results.json", json.dumps(results))
        record = {"inputs": "in", "target": "dans", "prediction": output.parent.name}
        text = (json.dumps(record) + "\n") * report.NUM_SAMPLES
        write_atomically(output / name / "predictions-10.jsonl", text)

    def sample(self, argv):
        print("sampled from", binding_values(argv)["CHECKPOINT_PATH"])
