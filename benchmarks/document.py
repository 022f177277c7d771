"""Runs benchmarks and writes their figures as tables into docs/performance.md.

python -m benchmarks.document                 # all of them, one after the other
python -m benchmarks.document memory decode   # these

A benchmark's lines go on to the terminal; when it has finished, its table takes the place of what
stands between `<!-- benchmarks.NAME -->` and `<!-- end -->`. One that fails leaves its table as it
was, the others are still run, and the exit code says so.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x.runtime import terminal
from diffusion_t5x.runtime.files import write_atomically

DOCUMENT = pathlib.Path(__file__).resolve().parents[1] / "docs" / "performance.md"
# name -> its arguments
BENCHMARKS: Mapping[str, Sequence[str]] = {
    "memory": (),
    "train_step": (),
    "decode": (),
    "figure3": ("--plot", str(DOCUMENT.with_name("figure3_machine.png"))),
    "input": (),
    "startup": (),
    "runtime_overhead": (),
    "decode_quality": (
        "--examples=256",
        "--settings",
        *("objective", "stop_unchanged", "halve", "fast"),
    ),
    # The parts that compile need libtpu, and half an hour; their tables are written by hand.
    "tpu": ("--parts=arithmetic", "--sizes=base,large,xl", "--lengths=512,4096"),
}


def run(name: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON lines of a benchmark, each also printed when it comes.

    Raises:
      subprocess.CalledProcessError: if it fails.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    records = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                records.append(json.loads(line))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return records


def _cell(key: str, value: Any) -> Any:
    """Bytes as GB, and names as they are."""
    if "bytes" in key and not key.endswith("ratio"):
        return f"{value / 1e9:.3g} GB"
    return str(value) if isinstance(value, (bool, str)) else value


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of a benchmark's records, one for each set of names that they have."""
    kinds: dict[tuple[str, ...], list[list[Any]]] = {}
    for record in records:
        names = tuple(name for name in record if name != "benchmark")
        kinds.setdefault(names, []).append([_cell(name, record[name]) for name in names])
    return "\n".join(
        terminal.markdown([name.replace("_", " ") for name in names], body)
        for names, body in kinds.items()
    )


def replace_table(document: str, name: str, markdown: str) -> str:
    """The document with another table of a benchmark.

    Raises:
      ValueError: if there is no place for it, or more than one.
    """
    pattern = re.compile(rf"(<!-- benchmarks\.{name} -->\n).*?(<!-- end -->)", re.DOTALL)
    document, count = pattern.subn(lambda found: found[1] + markdown + found[2], document)
    if count != 1:
        raise ValueError(
            f"{DOCUMENT.name} has {count} places for the table of benchmarks.{name}; expected 1."
        )
    return document


def main() -> None:
    """Runs the benchmarks asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    args = parser.parse_args()
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"{name!r} is no benchmark; known: {', '.join(BENCHMARKS)}.")
    failed = []
    for name in args.names or BENCHMARKS:
        try:
            markdown = table(run(name, BENCHMARKS[name]))
        except subprocess.CalledProcessError as error:
            print(f"benchmarks.{name} failed: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        write_atomically(
            DOCUMENT, replace_table(DOCUMENT.read_text(encoding="utf-8"), name, markdown)
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
