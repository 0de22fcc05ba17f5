"""Small matrices on one thread.

A BLAS shares even small products among all processors; where another program keeps one of
them busy, the others wait for it, and a look costs several times as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

from threadpoolctl import ThreadpoolController

__all__ = ["one_thread"]

_lock = RLock()


@cache
def _controller() -> ThreadpoolController:
    # looking for the libraries takes milliseconds; they stay where they are
    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, the BLAS of this process computes on one thread; afterwards as before.

    Two threads within it wait for each other: the setting belongs to the process, and must
    not be put back while the other still relies on it.
    """
    with _lock, _controller().limit(limits=1, user_api="blas"):
        yield
