"""What is wrong with a card, in one sentence: the key, the value, and what is allowed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from mm_autofocus.registry import suggest

__all__ = ["sentence_of"]


def sentence_of(errors: ValidationError, model: type[BaseModel], where: str) -> str:
    """Say the first error of a strict model in one sentence.

    Parameters
    ----------
    errors : ValidationError
        Of pydantic's.
    model : type of BaseModel
        What was validated.
    where : str
        Put before the key.
    """
    error = errors.errors()[0]
    path, kind, value, message = error["loc"], error["type"], error["input"], error["msg"]
    parts = [p for p in map(str, path) if "[" not in p and p != "float"]  # arms of a union
    key = ".".join([where, *parts])
    if kind == "json_invalid":
        return f"{where}: is no JSON"
    if kind == "extra_forbidden":
        owner: Any = model
        for part in parts[:-1]:
            owner = _nested(owner.model_fields[part].annotation)
        allowed = list(owner.model_fields)
        return f"{key}: unknown key{suggest(parts[-1], allowed)}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key}: is missing"
    if kind == "value_error":
        message = str(error.get("ctx", {}).get("error", message))
        head = ".".join([where, *parts[:-1]]) if parts else where
        return f"{head}.{message}"
    if kind == "literal_error":
        message = f"must be {error['ctx']['expected']}"
    elif kind in {"float_type", "int_type"} and isinstance(value, str):
        message = "must be a number, without quotes or a unit"
    elif kind == "string_pattern_mismatch":
        message = "must be 64 hexadecimal digits"
    else:
        message = (message[0].lower() + message[1:]).replace("input should", "must")
    return f"{key}: {value!r} is not allowed: {message}"


def _nested(annotation: Any) -> Any:
    """The model among the arms of an annotation."""
    arms = getattr(annotation, "__args__", (annotation,))
    return next(a for a in arms if isinstance(a, type) and issubclass(a, BaseModel))
