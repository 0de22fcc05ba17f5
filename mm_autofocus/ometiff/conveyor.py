"""A queue of bounded size in bytes, emptied by a thread."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Conveyor"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Conveyor(Generic[T]):
    """Hands items to `work`, in order, on a thread of its own.

    Parameters
    ----------
    name : str
        Of what it writes, for the thread and for messages.
    work : callable
        Called with each item on the thread. An exception ends the thread; it is kept in
        `fault`, and what is queued is dropped.
    limit : int
        Size of the queue in bytes; one item may always be in it.

    Attributes
    ----------
    fault : BaseException | None
        What ended the thread.
    """

    def __init__(self, name: str, work: Callable[[T], None], limit: int) -> None:
        self.fault: BaseException | None = None
        self._name = name
        self._work = work
        self._limit = limit
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._ending = False
        self._warned = False
        self._changed = threading.Condition()
        # a daemon: a program that dies without close() must not hang on this queue
        self._thread = threading.Thread(target=self._run, name=f"write {name}", daemon=True)
        self._thread.start()

    def put(self, item: T, size: int) -> bool:
        """Queue `item` of `size` bytes; wait while there is no room.

        Returns
        -------
        bool
            False if the thread has ended by a fault: the item is not taken.
        """
        with self._changed:
            if not self._room(size):
                if not self._warned:
                    self._warned = True
                    logger.warning(
                        "%s: the disk is slower than the camera; the acquisition waits for it",
                        self._name,
                    )
                # a little more than this item needs: not to wake up for each single one
                spare = size + self._limit // 16
                self._changed.wait_for(lambda: self.fault is not None or self._room(spare))
            if self.fault is not None:
                return False
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """Wait until all is done, and end the thread; idempotent."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()

    def _room(self, size: int) -> bool:
        return not self._bytes or self._bytes + size <= self._limit

    def _take(self) -> tuple[T, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ending)
            return self._items.popleft() if self._items else None

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                item, size = taken
                self._work(item)
                del item, taken  # its memory goes before the next is counted in
                with self._changed:
                    self._bytes -= size
                    self._changed.notify_all()
        except BaseException as e:  # noqa: BLE001 - told to the acquisition thread
            with self._changed:
                self.fault = e
                self._items.clear()
                self._changed.notify_all()
