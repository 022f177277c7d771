"""T5X's command-line flags, and the start of a command: TensorFlow, compilation cache, pod, gin."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import absl.flags
import absl.logging

import gin
from diffusion_t5x import gin_utils, paths
from diffusion_t5x.runtime import interrupts

GIN_FLAG = "--gin."


def comma_separated(text: str) -> list[str]:
    """Returns the parts of a flag's value that are not empty."""
    return [part for part in text.split(",") if part]


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser of the flags of T5X's commands, under the same names, and `--dry_run`."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--gin.NAME=VALUE binds one gin macro or parameter, after all files. absl's logging "
        "flags (--alsologtostderr, --verbosity, --log_dir, ...) show what libraries log.",
    )
    add = parser.add_argument
    add("--gin_file", action="append", default=[], help="gin file; repeat for several")
    add("--gin_bindings", action="append", default=[], help="NAME = VALUE; repeat for several")
    paths: dict[str, Any] = {"type": comma_separated, "default": []}
    add("--gin_search_paths", **paths, help="comma-separated directories of gin files")
    add("--tfds_data_dir", help="directory of TFDS data sets, instead of the tasks' own")
    add("--seqio_additional_cache_dirs", **paths, help="comma-separated SeqIO caches")
    add(
        "--distributed",
        "--multiprocess_gpu",
        action="store_true",
        help="join the processes of this TPU pod, GKE job or Slurm job",
    )
    add("--coordinator_address", help="host:port of process 0, for runs of several processes")
    add("--process_count", type=int, help="number of processes")
    add("--process_index", type=int, help="index of this process")
    add("--dry_run", action="store_true", help="build and compile everything, then stop")
    return parser


def rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
    """Rewrites each `--gin.NAME=VALUE` as `--gin_bindings=NAME=VALUE`."""
    return [
        f"--gin_bindings={arg[len(GIN_FLAG) :]}" if arg.startswith(GIN_FLAG) else arg
        for arg in argv
    ]


def run(
    function: str, description: str, argv: Sequence[str] | None = None, *, topology: bool = False
) -> Any:
    """Starts a command, parses its gin files, and returns what the configured `function` returns.

    SIGTERM and Ctrl-C end it as `runtime.interrupts` says, from the first moment on.

    Args:
      function: The dotted path of the function, e.g. 'diffusion_t5x.training.loop.train'.
      description: The first lines of `--help`.
      argv: The arguments after the program's name; None for this process's.
      topology: True if the command has `--topology`, a dry run for absent devices.

    Raises:
      SystemExit: if a flag is wrong.
    """
    with interrupts.end_on_signals():
        return _run(function, make_parser(description), argv, topology)


def _run(
    function: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None, topology: bool
) -> Any:
    if topology:
        text = (
            "with --dry_run: compile for this TPU slice, such as v5p:4x4x8, or for NVIDIA cards, "
        )
        text += "hosts x cards of each, such as h100:2x8, instead"
        parser.add_argument("--topology", help=text)
    args = start(parser, argv)
    chosen = getattr(args, "topology", None)
    if chosen and not args.dry_run:
        parser.error(f"--topology={chosen} is for --dry_run, which needs no devices.")
    if chosen:
        from diffusion_t5x.training import topologies

        topologies.devices(chosen)  # before JAX looks for devices of its own
        configure(args, ["hardware/topology.gin"], [f"TOPOLOGY={chosen!r}"])
    else:
        configure(args)
    from diffusion_t5x.runtime.guards import stops_when_full

    module, _, name = function.rpartition(".")
    configured = gin.get_configurable(getattr(importlib.import_module(module), name))
    with stops_when_full(_output_dir()):
        return configured(dry_run=True) if args.dry_run else configured()


def _output_dir() -> str:
    """Returns the directory that the configured command writes to."""
    for macro in (
        "%MODEL_DIR",
        "%EVAL_OUTPUT_DIR",
        "%INFER_OUTPUT_DIR",
        "%LM_EVAL_OUTPUT_DIR",
    ):
        with contextlib.suppress(ValueError):
            return paths.expand(str(gin.query_parameter(macro)), macro)
    return "."


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses flags as `run` does, imports TensorFlow, sets the compilation cache, joins the pod.

    JAX's own setting of the cache (`JAX_COMPILATION_CACHE_DIR`, which may name a bucket that all
    hosts of a pod share) has precedence over `xla` in this project's cache. What the flags of
    processes leave out, JAX reads from the environment of a TPU pod, GKE, Slurm or MPI.

    Raises:
      SystemExit: if a flag is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        rest = _take_logging_flags(argv)
    except (absl.flags.Error, OSError, ValueError) as error:
        parser.error(str(error))
    args = parser.parse_args(rewrite_gin_flags(rest))
    _import_tensorflow(quiet=len(rest) == len(argv))
    # Tracing makes millions of objects. Were TensorFlow's modules searched for garbage each time,
    # that would be a tenth of a start.
    if not gc.get_freeze_count():
        gc.freeze()
    import jax

    from diffusion_t5x.data.embedded import file_cache

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(file_cache.cache_dir() / "xla"))
    if args.distributed or args.coordinator_address is not None:
        # It would take SIGTERM from now on, though only the training loop asks for it.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(args.coordinator_address, args.process_count, args.process_index)
    return args


def _take_logging_flags(argv: Sequence[str]) -> list[str]:
    """Obeys absl's logging flags, such as `--alsologtostderr`, and returns the other arguments.

    With any of them the messages of libraries are shown, from INFO on if `--verbosity` is not set.

    Raises:
      absl.flags.Error, ValueError: if a value is wrong.
      OSError: if `--log_dir` cannot be written to.
    """
    flags = absl.flags.FlagValues()
    for flag in absl.flags.FLAGS.flags_by_module_dict()["absl.logging"]:
        flags[flag.name] = flag
    flags.set_gnu_getopt(True)
    rest = list(flags(["", *argv], known_only=True)[1:])
    if len(rest) < len(argv):
        if directory := flags["log_dir"].value:
            path = paths.as_path(directory, "--log_dir")
            if paths.is_remote(path):
                raise ValueError(f"--log_dir={directory}: absl logs to this machine alone.")
            path.mkdir(parents=True, exist_ok=True)
            absl.logging.get_absl_handler().use_absl_log_file("diffusion_t5x", str(path))
        absl.flags.FLAGS.mark_as_parsed()
        absl.logging.use_absl_handler()
        if flags["verbosity"].using_default_value:
            absl.logging.set_verbosity(absl.logging.INFO)
    return rest


def configure(
    args: argparse.Namespace, files: Sequence[str] = (), bindings: Sequence[str] = ()
) -> None:
    """Parses gin files and bindings, those given here first, and passes the data flags to SeqIO."""
    gin.clear_config()
    gin_utils.parse_config(
        [*files, *args.gin_file], [*bindings, *args.gin_bindings], args.gin_search_paths
    )
    if args.seqio_additional_cache_dirs or args.tfds_data_dir:
        import seqio

        if args.seqio_additional_cache_dirs:
            seqio.add_global_cache_dirs(args.seqio_additional_cache_dirs)
        if args.tfds_data_dir:
            seqio.set_tfds_data_dir_override(args.tfds_data_dir)


def _import_tensorflow(quiet: bool) -> None:
    """Imports TensorFlow, which only reads data here, without its GPUs.

    Discards what TensorFlow prints while it loads, before its log level can be set; if `quiet`,
    also what libraries log later, except errors.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if quiet:
        logging.getLogger("absl").setLevel(logging.ERROR)
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.set_visible_devices([], "GPU")
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
