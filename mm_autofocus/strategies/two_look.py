"""Two looks (or more) at fixed offsets in one approach, a prediction, one move."""

from __future__ import annotations

from typing import Final

from mm_autofocus.strategies.learned import Learned

__all__ = ["TwoLook"]


class TwoLook(Learned):
    """Let a model compare looks at the offsets of its card.

    They are taken from one end to the other without reversing the stage, in the direction
    in which it is approached (``backlash_um``). Where a limit is in the way, all of them
    are taken further inside.
    """

    name: Final = "two-look"
    several = True
