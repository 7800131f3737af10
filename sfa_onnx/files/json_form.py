"""JSON that somebody else may have written: is it of the form that its reader expects?"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["form_problem", "parsed"]

_NAMES = {str: "text", int: "a whole number", bool: "true or false", dict: "an object"}


def parsed(text: str | bytes) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error


def form_problem(value: Any, form: Any, where: str = "") -> str:
    """Where a JSON value is not of a form, as "sites[0].id is 3, expected text"; "" when it is.

    Args:
        value: as `parsed` returns it.
        form: a type; [form] for a list of any length; (form, form) for a list of that length;
            {"key": form} for an object, "?key" where the key may be left out; {str: form} for an
            object with any keys; None for anything.
        where: what the value is called.
    """
    if form is None:
        return ""
    if isinstance(form, type):
        fits = isinstance(value, form) and (form is bool or not isinstance(value, bool))
        return "" if fits else _told(value, where, _NAMES[form])
    if isinstance(form, dict):
        return _object(value, form, where)
    if not isinstance(value, list):
        return _told(value, where, "a list")
    if isinstance(form, tuple) and len(value) != len(form):
        return _told(value, where, f"a list of {len(form)}")
    forms = form if isinstance(form, tuple) else form * len(value)
    parts = (
        form_problem(v, f, f"{where}[{i}]")
        for i, (v, f) in enumerate(zip(value, forms, strict=True))
    )
    return next(filter(None, parts), "")


def _object(value: Any, form: dict[Any, Any], where: str) -> str:
    if not isinstance(value, dict):
        return _told(value, where, "an object")
    if str in form:
        parts = (form_problem(v, form[str], f"{where}[{k!r}]") for k, v in value.items())
        return next(filter(None, parts), "")
    for key, wanted in form.items():
        name = key.removeprefix("?")
        if name in value:
            if told := form_problem(value[name], wanted, f"{where}.{name}" if where else name):
                return told
        elif name == key:
            return f"{where or 'it'} lacks {name!r}"
    return ""


def _told(value: Any, where: str, expected: str) -> str:
    shown = json.dumps(value)
    shown = shown if len(shown) < 60 else shown[:57] + "..."
    return f"{where or 'it'} is {shown}, expected {expected}"
