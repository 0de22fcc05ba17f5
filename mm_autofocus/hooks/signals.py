"""What happens while a tile is focused, as signals, so that a GUI can draw it live."""

from __future__ import annotations

from psygnal import Signal, SignalGroup

from mm_autofocus.types import FocusRequest, Look

__all__ = ["FocusSignals"]


class FocusSignals(SignalGroup):
    """Signals of one engine; they are emitted in the thread of the acquisition.

    Attributes
    ----------
    started : Signal(dict, FocusRequest)
        A search begins: the plan's index, and the task.
    look : Signal(Look)
        A look was taken and scored.
    finished : Signal(dict)
        The search has ended: its record (see `Ledger.enter`).
    verified : Signal(dict)
        The first frame at that focus, or both shots of a tile, were judged: its record, as it
        is now.
    """

    started = Signal(dict, FocusRequest)
    look = Signal(Look)
    finished = Signal(dict)
    verified = Signal(dict)
