"""Documents and questions from the source of the standard library, which is parsed, never run."""

from __future__ import annotations

import ast
import itertools
import pathlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator

MAX_SIGNATURE = 90  # characters
MAX_SUMMARY = 70
MAX_SOURCE = 1_500


def _library_files() -> list[pathlib.Path]:
    """Returns the files of the standard library, sorted, without tests and vendored packages."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo",
               "__pycache__", "encodings", "pydoc_data"}  # fmt: skip
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not skipped & set(path.relative_to(root).parts)
        and not any(part.startswith("config-") for part in path.parts)
    ]


Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


def _definitions() -> Iterator[tuple[Node, list[str]]]:
    """Yields every module, class and function of the library, and the lines of its file."""
    for path in _library_files():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        # Not splitlines(), which also breaks at form feeds: the parser does not count lines there.
        lines = source.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, Node):
                yield node, lines


def _clean(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def generate_prose() -> Iterator[dict[str, str]]:
    """Yields the docstrings of the standard library, each once: `{'text'}`."""
    texts = (_clean(ast.get_docstring(node) or "") for node, _ in _definitions())
    for text in dict.fromkeys(texts):
        if len(text) >= 40:
            yield {"text": text}


def generate_source() -> Iterator[dict[str, str]]:
    """Yields the source of the functions of the standard library, each once: `{'text'}`."""
    texts = (
        _clean(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
        for node, lines in _definitions()
        if isinstance(node, ast.FunctionDef)
    )
    for text in dict.fromkeys(texts):
        # A function with a string whose lines start at the margin cannot be dedented.
        if text.startswith("def ") and 40 <= len(text) <= MAX_SOURCE:
            yield {"text": text}


def _questions(node: ast.FunctionDef, summary: str) -> Iterator[tuple[str, str]]:
    """Yields pairs of question and answer about a function and its docstring's first line."""
    arguments, defaults = node.args.posonlyargs + node.args.args, node.args.defaults
    names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
    more = node.args.vararg or node.args.kwonlyargs or node.args.kwarg
    if len(names) >= 2:
        if not more:
            yield f"Which parameter of {node.name} comes last?", names[-1]
        yield f"Which parameter of {node.name} comes first?", names[0]
        for before, after in itertools.pairwise(names):
            yield f"Which parameter comes after {before}?", after
    if defaults:
        for name, value in zip(names[-len(defaults) :], defaults, strict=False):
            yield f"What is the default of {name}?", ast.unparse(value)
    returned = re.match(r"Returns? (.{4,60}?)[.;:,]?$", summary)
    if returned:
        yield f"What does {node.name} return?", returned.group(1)


def generate_questions() -> Iterator[dict[str, str]]:
    """Yields SQuAD-like examples `{'context', 'question', 'answer'}` about functions.

    A context is a function's signature and the first line of its docstring; the answer is a span of
    the context. Functions with equal contexts appear once.
    """
    seen = set()
    for node, _ in _definitions():
        if not isinstance(node, ast.FunctionDef):
            continue
        summary = next(iter(_clean(ast.get_docstring(node) or "").splitlines()), "")
        signature = f"{node.name}({ast.unparse(node.args)})"
        if not summary or len(summary) > MAX_SUMMARY or len(signature) > MAX_SIGNATURE:
            continue
        context = f"{signature}: {summary}"
        if context in seen:
            continue
        seen.add(context)
        for question, answer in _questions(node, summary):
            if answer in context:
                yield {"context": context, "question": question, "answer": answer}
