"""The checksum that a model's card states of its own file.

A file cannot hold its own checksum, so it is taken with zeros in that place; the digits are
written last, over the zeros, and the length stays the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mm_autofocus.errors import InputError
from mm_autofocus.models.card import KEY, UNSEALED

if TYPE_CHECKING:
    from mm_autofocus.models.card import ModelCard

__all__ = ["checksum", "seal", "verify"]

# In protobuf: the key, the tag of the value, its length (a varint), and the value, JSON.
_CARD = re.compile(re.escape(KEY).encode() + rb"\x12.{1,5}?(?=\{)", re.DOTALL)
_END = re.compile(r'"sha256":"([0-9a-f]{64})"\}$')  # the last key of a card


def checksum(data: bytes) -> str:
    """SHA-256 of an ONNX file, taken with zeros in the place of the one that its card states.

    Of a file without a card, of the file as it is.
    """
    place = _place(data)
    if place is not None:
        data = data[:place] + UNSEALED.encode() + data[place + len(UNSEALED) :]
    return hashlib.sha256(data).hexdigest()


def seal(path: Path) -> str:
    """Write a file's checksum into the card inside it, in place.

    Parameters
    ----------
    path : Path
        An ONNX file whose card states zeros.

    Returns
    -------
    str
        The checksum.

    Raises
    ------
    InputError
        The file has no card, or is sealed already.
    """
    data = path.read_bytes()
    place = _place(data)
    if place is None:
        raise InputError(f"model: {path} has no card to write its checksum into")
    if data[place : place + len(UNSEALED)] != UNSEALED.encode():
        raise InputError(f"model: {path} is sealed already")
    digest = checksum(data)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())
    return digest


def verify(data: bytes, card: ModelCard, *, inside: bool, what: str = "model") -> None:
    """Refuse a file that is not what its card says; a card that states nothing passes.

    Parameters
    ----------
    data : bytes
        The file.
    card : ModelCard
        Its card.
    inside : bool
        Whether the card was read from the file itself, and not from beside it.
    what : str
        Name of the file in the message.

    Raises
    ------
    InputError
        The checksums differ.
    """
    if not card.sealed:
        return
    found = checksum(data) if inside else hashlib.sha256(data).hexdigest()
    if found != card.sha256:
        raise InputError(
            f"{what}: its sha256 is {found[:12]}…, its card says {card.sha256[:12]}…: the file "
            "was damaged or changed; copy or export it again"
        )


def _place(data: bytes) -> int | None:
    """Where the card inside a file states the checksum; None if it has no card."""
    for found in _CARD.finditer(data):
        # one character per byte, so that positions in the text are those in the file
        text = data[found.end() :].decode("latin-1")
        try:
            _, length = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError:
            continue
        if digits := _END.search(text[:length]):
            return found.end() + digits.start(1)
    return None
