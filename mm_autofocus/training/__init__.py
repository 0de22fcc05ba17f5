"""Datasets of z-stacks for learned focus: collect them, read them, split them.

Nothing here is imported while a plan runs, but by ``mm-autofocus collect`` itself.
"""

from __future__ import annotations

from mm_autofocus.training.dataset import Dataset
from mm_autofocus.training.split import Split
from mm_autofocus.training.stack import Stack

__all__ = ["Dataset", "Split", "Stack"]
