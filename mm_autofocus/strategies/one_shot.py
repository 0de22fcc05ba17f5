"""One look at the present z, a prediction, one move."""

from __future__ import annotations

from typing import Final

from mm_autofocus.strategies.learned import Learned

__all__ = ["OneShot"]


class OneShot(Learned):
    """Let a model tell the defocus from a single look.

    The sign of defocus must be in one image of the microscope, which `mm-autofocus
    calibrate` tells; where it is not, see `two_look.TwoLook`.
    """

    name: Final = "one-shot"
    several = False
