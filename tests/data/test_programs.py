"""Completions become programs, whatever is around them; plain Python says what passes."""

import textwrap
import time

import pytest

from diffusion_t5x.data import programs

PROMPT = 'import math\n\n\ndef inc(xs: list) -> list:\n    """Add one to each.\n    """\n'
BODY = "    return [x + 1 for x in xs]\n"
WHOLE = "def inc(xs):\n    return [x + 1 for x in xs]\n"


def _indented(text, blanks):
    return textwrap.indent(text, " " * blanks)


RIGHT = {
    "a body": BODY,
    "blank lines before": "\n\n" + BODY,
    **{
        f"a body, then {then!r}": f"{BODY}{then}\nundefined(\n"
        for then in (
            "@undefined", "import undefined", "from undefined import x", "assert inc(1)",
            "for x in undefined:", "while undefined:", "try:", "with undefined:", "class X(y):",
            "async def f():", "x = undefined", "undefined()", "if undefined:", "print(inc(", "```",
            "# Test\nundefined", '"""', "Here's what it does:", "</code>", "<|endoftext|>", "…",
        )
    },
    "comments in the first column": "    ys = []\n# each\n    for x in xs:\n#\n"
    "        ys.append(x + 1)\n#\n    return ys\n",
    "brackets that end in the first column": "    ys = [\n  x + 1 for x in xs\n]\n    return ys\n",
    "a string with lines in the first column": '    text = """\ndef f():\n"""\n' + BODY + "1 +\n",
    "no line end": BODY.rstrip(),
    "ends of lines of another system": "    ys = [1 + x for x in xs]\r\n    return ys\r\ntry:\r\n",
    "the whole function": WHOLE,
    "a helper after the whole function": "def inc(xs):\n    return one(xs)\n\n"
    "def one(xs):\n    return [x + 1 for x in xs]\n",
    "a fence": f"```python\n{WHOLE}```\n",
    "a fence without a name": f"```\n{WHOLE}```",
    "other fences": f"~~~py\n{WHOLE}~~~\n",
    "a fence that is not closed": f"```python\n{WHOLE}",
    "a fence that is only closed": f"{WHOLE}```\nIt adds one.\n",
    "a fence on the last line": f"{WHOLE.rstrip()}```",
    "a body in a fence": f"```python\n{BODY}```",
    "prose around a fence": f"Sure! Here's it:\n\n```python\n{WHOLE}```\n\nIt's what you want.",
    "one word before a fence": f"Answer\n```\n{WHOLE}```",
    "a command in the first fence": f"First\n```sh\npip install x\n```\nThen\n```py\n{WHOLE}```",
    "a use in the first fence": f"```\ninc([1])\n```\nneeds\n```\n{WHOLE}```",
    "prose in the fence": f"```python\n{WHOLE}That is all.\n```",
    "ends of lines of another system in a fence": f"```python\n{WHOLE}```".replace("\n", "\r\n"),
    **{
        f"a body, then {token}": BODY.rstrip() + token + "\n"
        for token in ("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>", "<end_of_turn>")
    },
    "tokens around": f"<s><|im_start|>assistant\n{WHOLE}<|im_end|>\n<|im_start|>user\nThanks",
    "tokens around a fence": f"<|assistant|>\n```python\n{WHOLE}```<|end|>",
    "a turn around a body": f"<start_of_turn>model\n{BODY}<end_of_turn>",
    "prose after the whole function": f"{WHOLE}\nIt's an increment.\n",
    "a fence in a list": f"1. So:\n\n    ```python\n{_indented(WHOLE, 4)}    ```\n",
    "a fence in a list, with other indentation": f"- ```\n{_indented(WHOLE, 2)}  ```\n",
    "a token and a blank": f"<s> {WHOLE}",
    "MBPP's marks": f"[BEGIN]\n{WHOLE}[DONE]\nundefined",
    "MBPP's last mark": f"{WHOLE}[DONE]",
    "prose before the whole function": f"Here's the function you want:\n\n{WHOLE}",
}  # fmt: skip


def _passes(program):
    names = {}
    try:
        exec(program, names)
        return names["inc"]([1, 2]) == [2, 3] and "math" in names
    except Exception:
        return False


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_completion_passes(name):
    assert _passes(programs.complete(PROMPT, RIGHT[name]))


def test_fences_in_strings_of_a_program_stay():
    texts = [f'    """\n```\n<|endoftext|>\n```\n    """\n{BODY}', f'"""```\n```py\n"""\n{WHOLE}']
    for text in texts:
        assert programs.complete(PROMPT, text) == PROMPT + text
        assert _passes(PROMPT + text)


@pytest.mark.parametrize(
    "text", ["", "I cannot.", "    return (", "```\n```", "<|endoftext|>", "\0"]
)
def test_what_is_no_program_remains_what_it_is(text):
    assert programs.complete(PROMPT, text) == PROMPT + text
    assert programs.complete("", text) == text
    assert not programs.is_program(text)


def test_without_a_prompt_a_text_is_a_whole_program():
    assert programs.complete("", WHOLE) == WHOLE
    assert programs.complete("", f"So:\n```python\n{WHOLE}```\n") == WHOLE
    assert programs.complete("", f"[BEGIN]\n{WHOLE}[DONE]") == WHOLE
    assert programs.complete("", _indented(WHOLE, 4)) == WHOLE
    assert (
        programs.complete("", "def f():\n    pass\nprint(1)\n") == "def f():\n    pass\nprint(1)\n"
    )


def test_a_signature_without_a_docstring_takes_a_body_or_the_whole_function():
    prompt = "import math\ndef inc(xs):\n"
    assert all(_passes(programs.complete(prompt, text)) for text in (BODY, WHOLE))


def test_markup_stays_where_that_is_set():
    text = f"```python\n{WHOLE}```"
    assert programs.complete(PROMPT, text, strip_markup=False) == PROMPT + text


def test_a_long_text_that_is_no_program_takes_few_attempts(monkeypatch):
    compiled = []
    original = programs._error_of
    monkeypatch.setattr(programs, "_error_of", lambda t: compiled.append(t) or original(t))
    programs.complete(PROMPT, "    return (\n" + "x y\n" * 5000)
    programs.complete(PROMPT, "x y\n```\n" * 2000)
    assert len(compiled) < 20 * programs.MOST_CUTS


@pytest.mark.parametrize("levels", [8, 10, 40])
def test_nested_finally_which_a_compiler_writes_out_each_time_takes_no_memory(levels):
    lines = ["while 1:"]
    for level in range(levels):
        space = " " * (level + 1)
        lines += [f"{space}try:", f"{space} break", f"{space} continue", f"{space}finally:"]
    text = "\n".join([*lines, " " * (levels + 1) + "x = 1"])
    started = time.process_time()
    assert programs.is_program(text) == (levels == 8)
    assert time.process_time() - started < 5
