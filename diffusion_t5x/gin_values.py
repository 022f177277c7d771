"""Types of gin's macros and parameters: those of the annotated parameters that the values reach."""

from __future__ import annotations

import ast
import contextlib
import inspect
import numbers
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin

import typeguard
from etils import epath
from gin.config import ConfigurableReference

import gin
from diffusion_t5x.names import nearest

Key = tuple[str, str, str]  # (scope, selector, parameter); the scope of a macro is its name
MACRO = "gin.macro"
_UNKNOWN = object()
_WORDS: Mapping[str, Any] = {
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("none", "null", "nil"), None),
}


def settle(typed: Mapping[Key, str]) -> None:
    """Gives the values of the command line their parameters' types, and checks all bindings.

    Where a text is expected it stays as it was typed, whatever gin reads: a directory may be
    called 2024. Call this before gin's configuration is locked.

    Args:
      typed: The values of the command line, as they were typed. Those that gin cannot read are
        bound as these texts.

    Raises:
      ValueError: If a value is not of its parameter's type; the message says what was meant.
    """
    for key, text in typed.items():
        value = gin.config._CONFIG[key[:2]][key[2]]
        types = [annotation for _, annotation in _readers(key)]
        if _UNKNOWN in types and value == text:
            _refuse(key, key, None, value)
        if _UNKNOWN in types or not types or _is_reference(value) or value is None:
            continue
        for annotation in types:
            # 'none' where a text or None is expected would be a silent surprise.
            word = _WORDS.get(text.lower(), _UNKNOWN)
            if value == text and word is not _UNKNOWN and accepts(annotation, word):
                _refuse(key, key, annotation, value)
        if not _all_accept(types, value) and _all_accept(types, text):
            gin.bind_parameter(key, text)
    for key, value in _bindings():
        if key[1] != MACRO:
            _check(key, value)


def _all_accept(annotations: list[Any], value: Any) -> bool:
    return all(accepts(annotation, value) for annotation in annotations)


def accepts(annotation: Any, value: Any) -> bool:
    """Returns whether a value is of a type.

    Lists, tuples and sets count as each other, a text as a path and as the dtype that it names, and
    a number as one of numpy's. A text is no sequence of texts.
    """
    if isinstance(value, str):
        members = get_args(annotation) if _is_union(annotation) else (annotation,)
        of_texts = [
            m for m in members if issubclass(str, _origin(m)) and issubclass(_origin(m), Iterable)
        ]
        kept = [m for m in members if m not in of_texts]
        if len(kept) < len(members):
            return any(accepts(member, value) for member in kept)
    for candidate in (value, *_written_as(value)):
        try:
            typeguard.check_type(
                candidate,
                annotation,
                forward_ref_policy=typeguard.ForwardRefPolicy.IGNORE,
                collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
            )
        except typeguard.TypeCheckError:
            continue
        except Exception:  # nothing is known about a type that cannot be checked
            return True
        return not (isinstance(value, str) and _names_no_dtype(annotation, value))
    return False


def _written_as(value: Any) -> Iterator[Any]:
    """Yields the values of types that gin cannot write which a value stands for."""
    import numpy as np

    if isinstance(value, list | tuple):
        with contextlib.suppress(TypeError):  # a member that no set can hold
            yield from (set(value), frozenset(value))
        yield from (tuple(value), list(value))
    elif isinstance(value, str):
        yield from (pathlib.Path(value), epath.Path(value))
        with contextlib.suppress(Exception):  # no dtype's name
            yield np.dtype(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from (np.float32(), np.float64())
        yield from (np.int32(), np.int64()) if isinstance(value, int) else ()


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _origin(annotation: Any) -> type:
    """Returns the class of a type with members, such as `Sequence`; `type` for any other."""
    origin = get_origin(annotation)
    return origin if inspect.isclass(origin) else type


def _check_number(value: Any, origin: Any, args: Any, memo: Any) -> None:
    """Refuses True and False as numbers, which Python and typeguard accept."""
    kind = numbers.Integral if origin is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise typeguard.TypeCheckError(f"is not {origin.__name__}")


typeguard.checker_lookup_functions.insert(
    0, lambda origin, args, extras: _check_number if origin in (int, float) else None
)


def _has_dtype(annotation: Any) -> bool:
    members = get_args(annotation) or (annotation,)
    return any(getattr(m, "__module__", "") == "numpy" and m.__name__ == "dtype" for m in members)


def _names_no_dtype(annotation: Any, value: str) -> bool:
    if not _has_dtype(annotation):
        return False
    import numpy as np

    try:
        np.dtype(value)
    except TypeError:
        return True
    return False


def _bindings() -> Iterator[tuple[Key, Any]]:
    for (scope, selector), parameters in list(gin.config._CONFIG.items()):
        for name, value in list(parameters.items()):
            yield (scope, selector, name), value


def _is_reference(value: Any) -> bool:
    return isinstance(value, ConfigurableReference)


def _macro(value: Any) -> str | None:
    """Returns the name of the macro that a value is; None for any other value."""
    is_macro = _is_reference(value) and value.configurable.selector == MACRO
    return value.config_key[0] if is_macro else None


def _readers(key: Key) -> list[tuple[Key, Any]]:
    """Returns the parameters, with their types, that a binding reaches, perhaps through macros."""
    if key[1] != MACRO:
        return [(key, _annotation(key))]
    readers = (reader for reader, value in _bindings() if _macro(value) == key[0])
    return [found for reader in readers for found in _readers(reader)]


def _annotation(key: Key) -> Any:
    """Returns the type of a parameter, from its annotation or else its default if that is a text.

    It is `_UNKNOWN` for a parameter without, and for `Any`.
    """
    function = gin.config._REGISTRY[key[1]].wrapped
    is_class = inspect.isclass(function)
    called = inspect.unwrap(function.__init__ if is_class else function)
    default: Any = _UNKNOWN
    with contextlib.suppress(ValueError, TypeError, KeyError):
        default = inspect.signature(function).parameters[key[2]].default
    # flax evaluates its classes' annotations nowhere, so that only the classes themselves can tell.
    for owner in (called, *((function.__new__, *function.__mro__) if is_class else ())):
        with contextlib.suppress(Exception):  # not written in Python, or a type that is not there
            raw = inspect.get_annotations(owner).get(key[2], _UNKNOWN)
            names = getattr(owner, "__globals__", None) or vars(sys.modules[owner.__module__])
            found = eval(raw, dict(names)) if isinstance(raw, str) else raw
            if found not in (_UNKNOWN, Any, inspect.Parameter.empty):
                implied = default is None and not accepts(found, None)
                return Union[found, None] if implied else found  # noqa: UP007
    return str if isinstance(default, str) else _UNKNOWN


def _resolve(value: Any) -> Any:
    """Returns a value with the macros in it replaced; `_UNKNOWN` if other references remain."""
    if (name := _macro(value)) is not None:
        return _resolve(gin.config._CONFIG.get((name, MACRO), {}).get("value", _UNKNOWN))
    if isinstance(value, dict):
        members = [_resolve(member) for member in value.values()]
        known = not any(_is_reference(m) or m is _UNKNOWN for m in members)
        return dict(zip(value, members, strict=True)) if known else _UNKNOWN
    if isinstance(value, list | tuple):
        members = [_resolve(member) for member in value]
        known = not any(_is_reference(m) or m is _UNKNOWN for m in members)
        return type(value)(members) if known else _UNKNOWN
    return value


def _check(key: Key, value: Any) -> None:
    """Refuses a value, or a function that is not called, that does not fit its parameter."""
    annotation, resolved = _annotation(key), _resolve(value)
    if annotation is _UNKNOWN or resolved is _UNKNOWN:
        return
    probe: Any = resolved
    if _is_reference(resolved):
        members = get_args(annotation) if _is_union(annotation) else (annotation,)
        if resolved.evaluate or any(type in (get_origin(m), m) for m in members):
            return
        probe = _a_function
    if not accepts(annotation, probe):
        name = _macro(value)
        source = (name, MACRO, "value") if name is not None else key
        _refuse(source, key, annotation, resolved)


def _a_function(*args: Any, **kwargs: Any) -> None:
    """Stands for any function."""


def _refuse(key: Key, reader: Key, annotation: Any, value: Any) -> None:
    """Raises the error of a value that does not fit the parameter `reader` that it reaches."""
    name = key[0] if key[1] == MACRO else _name(key)
    if annotation is None:
        raise ValueError(
            f"{name} = {value!r} is no value that gin can read, and whether a text is expected "
            f'is not known. For a text: --gin.{name}="{value!r}".'
        )
    if key[1] == MACRO and reader == key:
        reader = next(found for found, known in _readers(key) if known == annotation)
    through = "" if key == reader else f" for {_name(reader)}"
    meant = _meant(annotation, value)
    hint = f" Did you mean {meant}?" if meant is not None else ""
    if isinstance(value, str) and accepts(annotation, value):
        hint += f' For the text: --gin.{name}="{value!r}".'
    raise ValueError(f"{name} = {value!r}; expected {_describe(annotation)}{through}.{hint}")


def _name(key: Key) -> str:
    return f"{'.'.join(key[1].split('.')[-2:])}.{key[2]}"


def _describe(annotation: Any) -> str:
    text = annotation.__name__ if inspect.isclass(annotation) and not get_args(annotation) else ""
    text = text or re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(annotation))
    return text + ", such as {'inputs': 64, 'targets': 32}" * ("Mapping[str, int]" in text)


def _meant(annotation: Any, value: Any) -> str | None:
    """Returns what was probably meant by a value that does not fit, as it should be written."""
    if _is_reference(value):
        return f"{value!r}()"
    for guess in _guesses(value):
        with contextlib.suppress(Exception):  # a guess that does not come off
            found = guess()
            if found is not _UNKNOWN and accepts(annotation, found):
                return repr(found)
    if isinstance(value, str) and _has_dtype(annotation):
        return repr(nearest(value, ("bfloat16", "float16", "float32", "float64"), cutoff=0.0))
    return None


def _guesses(value: Any) -> tuple[Callable[[], Any], ...]:
    if not isinstance(value, str):
        return (
            lambda: {0: False, 1: True}[value],
            lambda: int(value) if int(value) == value else _UNKNOWN,
            lambda: str(value),
        )
    text = value.strip().strip("'\"")

    def read(text: str) -> Any:
        number = ast.literal_eval(text)
        return int(number) if isinstance(number, float) and number.is_integer() else number

    return (
        lambda: _WORDS.get(text.lower(), _UNKNOWN),
        lambda: {False: None}[_WORDS[text.lower()]],
        lambda: ast.literal_eval(text),
        lambda: read(text),
        lambda: ast.literal_eval(re.sub(r"(\d),(\d)", r"\1.\2", text)),
        lambda: ast.literal_eval(text.replace(",", "")),
        lambda: (value,),
    )
