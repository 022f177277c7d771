"""Python programs from what a model writes, and what they may use while they run."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence

import gin

# Attempts to find a program in a text, and to find its end, each of which compiles it.
MOST_CUTS = 20
MOST_WEIGHT = 500_000  # of a program that is compiled here, by `_weight`
_FENCE = re.compile(r"```([\w.+-]*)[ \t]*\r?$|^~~~([\w.+-]*)[ \t]*\r?$", re.MULTILINE)
_TOKEN = (
    r"(?:<\|[^<>|\n]{1,40}\|>|<\uff5c[^<>\n]{1,40}\uff5c>|</?s>|\[/?INST\]"
    r"|<(?:eos|bos|pad|unk|(?:start|end)_of_turn)>)"
)
_SPECIAL = re.compile(_TOKEN)
_OPENING = re.compile(rf"\A\s*(?:{_TOKEN}(?:(?:assistant|model)[ \t]*\n)?)+")
# MBPP's own marks around a program, which are valid Python too.
_MARKS = re.compile(r"^\[(?:BEGIN|PYTHON)\][ \t\r]*\n|^\[(?:DONE|/PYTHON)\].*\Z", re.M | re.S)
_IN_FIRST_COLUMN = re.compile(r"^(?=[^\s#])", re.MULTILINE)  # comments may stand there in a body
_STATEMENT = re.compile(r"^(?:async def|def|class|import|from|@)\b", re.MULTILINE)


def _error_of(text: str) -> BaseException | None:
    """Returns why a text does not compile, or None if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Nested `finally` would take all memory.
            if "finally" in text and _weight(ast.parse(text)) > MOST_WEIGHT:
                return OverflowError("too much code in nested `finally`")
            compile(text, "<program>", "exec", dont_inherit=True)
    except (
        *(SyntaxError, ValueError, OverflowError),
        *(RecursionError, MemoryError, SystemError),
    ) as error:
        return error
    return None


def _weight(node: ast.AST) -> int:
    """Counts what a compiler makes of a tree: `finally` is written for each way out of `try`."""
    weights = {child: _weight(child) for child in ast.iter_child_nodes(node)}
    weight = 1 + sum(weights.values())
    if isinstance(node, ast.Try | ast.TryStar) and node.finalbody:
        inside = (n for part in (*node.body, *node.handlers, *node.orelse) for n in ast.walk(part))
        exits = 1 + sum(isinstance(n, ast.Return | ast.Break | ast.Continue) for n in inside)
        weight += exits * sum(weights[child] for child in node.finalbody)
    return weight


def is_program(text: str) -> bool:
    """Returns True if a text is valid Python, and not empty."""
    return bool(text.strip()) and _error_of(text) is None


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Limits:
    """What a generated program may use while it runs with its tests: see docs/sandbox.md.

    Attributes:
      wall_seconds: Time of the program and its tests together.
      cpu_seconds: Processor time of one process.
      memory_bytes: Address space of one process.
      total_memory_bytes: Memory of all processes of the program, with its files in memory.
      file_bytes: Size of one file.
      scratch_bytes: Size of all files.
      processes: Processes and threads at once.
      open_files: Open files of one process.
      modules: What may be imported besides the standard library; each brings what its package
        requires.
      allow_unprotected: Run programs even if nothing protects the user's files from them.

    Raises:
      ValueError: if a limit is not positive.
    """

    wall_seconds: float = 5.0
    cpu_seconds: int = 3
    memory_bytes: int = 2**30
    total_memory_bytes: int = 2**30
    file_bytes: int = 2**20
    scratch_bytes: int = 16 * 2**20
    processes: int = 64
    open_files: int = 64
    modules: Sequence[str] = ("numpy",)
    allow_unprotected: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("modules", "allow_unprotected") and not value > 0:
                raise ValueError(f"{field.name} = {value}; expected more than 0.")


@gin.configurable
def complete(prompt: str, completion: str, strip_markup: bool = True) -> str:
    """Joins a prompt and its completion to a program.

    A completion that begins with indentation is the body of the prompt's function, and ends where
    the next statement, or anything else but a comment, begins in the first column. Any other
    completion is a program that defines the function again; the prompt, with its imports and
    helpers, stays before it. What is valid Python in this way is not changed further.

    Args:
      prompt: The signature and docstring of a function, perhaps after imports and helpers; or ''.
      completion: The text that a model predicted.
      strip_markup: Leaves out lines `[BEGIN]` and what follows `[DONE]`. Where that is no valid
        program, takes the program out of Markdown fences, special tokens such as `<|endoftext|>`
        and the prose around them, and out of its common indentation.
    """
    completion = _MARKS.sub("", completion) if strip_markup else completion
    program = _join(prompt, completion)
    if not strip_markup or is_program(program):
        return program
    candidates = itertools.islice(_candidates(completion), MOST_CUTS)
    joined = (_join(prompt, text) for text in candidates if text.strip())
    return next((text for text in joined if is_program(text)), program)


def strips_markup() -> bool:
    """Returns what is set of `complete.strip_markup`."""
    return gin.get_bindings(complete).get("strip_markup", True)


def _join(prompt: str, completion: str) -> str:
    if not prompt:
        return completion
    if completion.lstrip("\r\n")[:1].isspace():
        return prompt + _body(prompt, completion)
    program = prompt + completion
    if _error_of(program) and not is_program(prompt):  # a signature alone lacks a body
        bodied = f"{prompt.rstrip()}\n    pass\n{completion}"
        return bodied if is_program(bodied) else program
    return program


def _body(prompt: str, completion: str) -> str:
    """Cuts a completion after the body of the prompt's function.

    Brackets and strings of a body may have lines in the first column; what ends inside one is no
    program.
    """
    cuts = [match.start() for match in _IN_FIRST_COLUMN.finditer(completion)][:MOST_CUTS]
    parts = [completion[:cut] for cut in cuts]
    return next(
        (part for part in [*parts, completion] if is_program(prompt + part)),
        parts[0] if parts else completion,
    )


def _candidates(text: str) -> Iterator[str]:
    """Yields what may be the program in a text, the likeliest first."""
    text = _SPECIAL.split(_OPENING.sub("", text), maxsplit=1)[0]
    yield text
    for part in [*_fenced(text), text]:
        if is_program(whole := textwrap.dedent(part)) and _STATEMENT.match(whole):
            yield whole  # of an indented block, in a list
        yield part
        if start := _STATEMENT.search(part):
            yield from _beginnings(part[start.start() :])


def _fenced(text: str) -> list[str]:
    """Returns the blocks between fences, and what is before the first one, the likeliest first."""
    fences = [*itertools.islice(_FENCE.finditer(text), MOST_CUTS)]
    if not fences:
        return []
    before = text[: fences[0].start()]
    edges = [*fences, None]
    closes = not (fences[0][1] or fences[0][2]) and _is_code(before)
    if closes:  # the prompt had the opening one
        edges = edges[1:]
    blocks = [
        text[opening.end() : closing.start() if closing else len(text)].lstrip("\r\n")
        for opening, closing in zip(edges[::2], edges[1::2], strict=False)
        if opening
    ]
    return [before, *blocks] if closes else [*(b for b in blocks if _is_code(b)), *blocks, before]


def _is_code(text: str) -> bool:
    """Returns True for a body, or a program that does more than name things, as prose may."""
    if text.lstrip("\r\n")[:1].isspace():
        return True
    if not is_program(text):
        return False
    return any(not isinstance(node, ast.Expr) for node in ast.parse(text).body)


def _beginnings(text: str) -> Iterator[str]:
    """Yields a program and its beginnings before lines that are none, the longest first."""
    yield text
    error = _error_of(text)
    line = getattr(error, "lineno", None) or 1
    lines = text.splitlines(keepends=True)
    starts = [n for n, one in enumerate(lines[:line]) if n and _IN_FIRST_COLUMN.match(one)]
    for start in starts[::-1][:MOST_CUTS]:
        yield "".join(lines[:start])
