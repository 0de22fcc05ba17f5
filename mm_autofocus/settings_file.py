"""A file of settings, as ``mm-autofocus calibrate`` writes and ``run --settings`` reads it.

It is a plan with nothing in it but ``metadata: {mm_autofocus: {...}}``, so that its text can
also be pasted into a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.settings import KEY, parse_settings

__all__ = ["check_new_file", "read_settings", "settings_text", "write_text"]


def read_settings(path: Path) -> dict[str, Any]:
    """Read and check the settings in a file.

    Returns
    -------
    dict
        Keys as in ``metadata.mm_autofocus`` of a plan; whatever else a plan holds is left.

    Raises
    ------
    InputError
        No such file, no settings in it, or settings that are not allowed.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({e})") from None
    except yaml.YAMLError as e:
        problem = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise InputError(f"{path}: does not parse as YAML: {problem}") from None
    metadata = data.get("metadata") if isinstance(data, Mapping) else None
    given = metadata.get(KEY) if isinstance(metadata, Mapping) else None
    if not isinstance(given, Mapping):
        raise InputError(f"{path}: has no settings, metadata: {{{KEY}: {{...}}}}")
    try:
        parse_settings(given)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    return dict(given)


def settings_text(
    settings: Mapping[str, Any], why: Mapping[str, str] | None = None, notes: str = ""
) -> str:
    """Write settings as YAML, each with its reason behind it.

    Parameters
    ----------
    settings : mapping
        As in ``metadata.mm_autofocus``.
    why : mapping, optional
        Key → comment.
    notes : str, optional
        Comment above all, in lines.

    Raises
    ------
    InputError
        The settings are not allowed.
    """
    parse_settings(settings)
    lines = [f"# {line}".rstrip() for line in notes.splitlines()]
    lines += ["metadata:", f"  {KEY}:"]
    for key, value in settings.items():
        text = yaml.safe_dump(
            value, default_flow_style=True, allow_unicode=True, width=1000000
        ).removesuffix("...\n")
        comment = (why or {}).get(key)
        lines.append(f"    {key}: {text.rstrip()}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def check_new_file(path: Path, *, overwrite: bool, kinds: tuple[str, ...]) -> None:
    """Raise `InputError` if a file of one of these kinds cannot be written there."""
    if path.suffix.lower() not in kinds:
        raise InputError(f"{path}: must be a {' or '.join(kinds)} file")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; use --overwrite or another name")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")


def write_text(path: Path, text: str) -> None:
    """Write a text file; a full or a locked disk is a `HardwareError`."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise HardwareError(f"{path}: cannot be written ({e.strerror})") from e
