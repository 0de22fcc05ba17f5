"""``mm-autofocus train``: what the options ask for, checked and carried out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_autofocus.errors import InputError

__all__ = ["train_shown"]


def train_shown(
    dataset: Path,
    output: Path,
    *,
    model: str | None,
    looks: str | None,
    config: Path | None,
    sets: Mapping[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """Train as the command line asks for; see `mm_autofocus.training.train.train`.

    The file comes first, then the flags, then ``--set``.

    Raises
    ------
    InputError
        Of any of them.
    """
    from mm_autofocus.training.options import merge_sets, read_options, read_options_file
    from mm_autofocus.training.train import train

    given: dict[str, Any] = {} if config is None else read_options_file(config)
    if model is not None:
        given["model"] = model
    if looks is not None:
        given["looks_um"] = _offsets(looks)
    given = merge_sets(given, sets)
    # of a run that goes on, only what is to change is given
    options = given if resume else read_options(given, where=str(config or "--set"))
    return train(dataset, output, options, resume=resume)


def _offsets(text: str) -> list[float]:
    try:
        return [float(part) for part in text.strip("[] ").split(",")]
    except ValueError:
        raise InputError(
            f"--looks: {text!r} is not allowed: numbers in µm with commas between them, for "
            "example 0,4"
        ) from None
