"""MBPP as a TFDS builder, which TFDS lacks; importing this module registers `mbpp` with TFDS.

`tfds.load("mbpp")` and `tfds build` then work as for any other data set. Nothing is downloaded
until it is read.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

# Split -> first and last task (Austin et al. 2021, arXiv 2108.07732, section 2.1).
SPLITS = {"train": (601, 974), "validation": (511, 600), "test": (11, 510), "prompt": (1, 10)}
VERSION = "1.0.0"
NAME = f"mbpp/full:{VERSION}"
_URL = (
    "https://raw.githubusercontent.com/google-research/google-research/"
    "2251e8c67a7fe7d6348714967ee101080b28e956/mbpp/mbpp.jsonl"
)


class Mbpp(tfds.core.GeneratorBasedBuilder):
    """Mostly Basic Python Problems: descriptions, reference programs and assertions."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="full", description="All problems.", version=VERSION)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        texts = tfds.features.Sequence(tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "task_id": np.int32,
                    "text": tfds.features.Text(),
                    "code": tfds.features.Text(),
                    "test_list": texts,
                    "test_setup_code": tfds.features.Text(),
                    "challenge_test_list": texts,
                }
            ),
            homepage="https://github.com/google-research/google-research/tree/master/mbpp",
            license="CC-BY-4.0",
        )

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Iterator[Any]]:
        path = pathlib.Path(dl_manager.download(_URL))
        return {split: self._generate_examples(path, *ids) for split, ids in SPLITS.items()}

    def _generate_examples(
        self, path: pathlib.Path, first: int, last: int
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for line in path.read_text(encoding="utf-8").splitlines():
            problem = json.loads(line)
            if first <= problem["task_id"] <= last:
                yield problem["task_id"], {name: problem[name] for name in self.info.features}
