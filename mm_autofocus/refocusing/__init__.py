"""Two shots in, one sharp image out: whole files, live during a run, or on a cluster.

Pairs go one way::

    source (a file) ──► pairs ──► recovering (a model, one pair) ──► fused (a file)
                          ▲          here, in `live`'s process, or on `cluster`
    live follows a file that is still being written
"""

from __future__ import annotations

from mm_autofocus.refocusing.running import DEFAULT_MODEL, Refocused, refocus

__all__ = ["DEFAULT_MODEL", "Refocused", "refocus"]
