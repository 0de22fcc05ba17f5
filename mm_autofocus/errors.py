"""The errors a user can meet, one small family.

Each class knows the exit code that the command line gives it, so that a script, the
command line and a GUI agree on what happened.
"""

from __future__ import annotations


class AutofocusError(Exception):
    """Base of all errors that mm_autofocus raises on purpose."""

    exit_code: int = 3


class InputError(AutofocusError, ValueError):
    """Bad input: a sentence with the key, the value and what is allowed.

    Raised before anything has moved and before anything was written.
    """

    exit_code = 2


class FocusFailedError(AutofocusError):
    """A tile could not be focused and the policy was ``on_failure: abort``."""

    exit_code = 1


class HardwareError(AutofocusError, RuntimeError):
    """A device or a disk failed while the run was under way."""

    exit_code = 3


class LimitError(HardwareError):
    """A z outside the limits was asked for; the stage was not moved there."""


class CancelledError(AutofocusError):
    """The run was cancelled between two looks; the stage is back at its start."""

    exit_code = 1
