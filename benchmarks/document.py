"""Runs benchmarks and writes their figures as tables into benchmarks/README.md.

python -m benchmarks.document                 # all benchmarks, one after the other
python -m benchmarks.document memory decode   # only these

The lines of a benchmark are also printed. When it has finished, its table replaces the text
between `<!-- benchmarks.NAME -->` and `<!-- end -->`. A benchmark that fails leaves its table
unchanged; the others still run, and the exit code is 1.
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

from diffusion_t5x.names import did_you_mean
from diffusion_t5x.runtime import terminal
from diffusion_t5x.runtime.files import write_atomically

DOCUMENT = pathlib.Path(__file__).with_name("README.md")
# Arguments of each benchmark, in the order in which they run. Those that need a compiler of TPUs or
# NVIDIA cards, or a card, are not among them; their tables are written by hand.
BENCHMARKS: Mapping[str, Sequence[str]] = {
    "memory": (),
    "train_step": (),
    "decode": (),
    "figure3": ("--plot", str(DOCUMENT.with_name("figure3.png"))),
    "input": (),
    "startup": (),
    "runtime_overhead": (),
    "code_execution": (),
    "decode_quality": (
        "--examples=256",
        "--settings",
        *("objective", "stop_unchanged", "halve", "fast"),
    ),
}


def run(name: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Runs a benchmark in a process of its own and prints its lines as they come.

    Args:
      name: The module's name, below `benchmarks`.
      arguments: Command-line arguments of the module.

    Returns:
      The records that the benchmark printed, one per JSON line.

    Raises:
      subprocess.CalledProcessError: The benchmark failed.
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
    """Formats bytes as GB and leaves names as they are."""
    if "bytes" in key and not key.endswith("ratio"):
        return f"{value / 1e9:.3g} GB"
    return str(value) if isinstance(value, (bool, str)) else value


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a benchmark's records as Markdown, one table for each set of names among them."""
    kinds: dict[tuple[str, ...], list[list[Any]]] = {}
    for record in records:
        names = tuple(name for name in record if name != "benchmark")
        kinds.setdefault(names, []).append([_cell(name, record[name]) for name in names])
    return "\n".join(
        terminal.markdown([name.replace("_", " ") for name in names], body)
        for names, body in kinds.items()
    )


def replace_table(document: str, name: str, markdown: str) -> str:
    """Replaces the table of a benchmark.

    Args:
      document: The text of the page.
      name: The benchmark's name.
      markdown: The new table, ending with a newline.

    Returns:
      The text of the page with the new table.

    Raises:
      ValueError: The page has no place for the table, or more than one.
    """
    pattern = re.compile(rf"(<!-- benchmarks\.{name} -->\n).*?(<!-- end -->)", re.DOTALL)
    document, count = pattern.subn(lambda found: found[1] + markdown + found[2], document)
    if count != 1:
        raise ValueError(
            f"benchmarks/{DOCUMENT.name} has {count} places for the table of benchmarks.{name}; "
            "expected 1."
        )
    return document


def main() -> None:
    """Runs the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    args = parser.parse_args()
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"benchmark {name!r} is unknown; {did_you_mean(name, BENCHMARKS)}")
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
