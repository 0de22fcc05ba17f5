"""The process beside a run: recovers each pair as soon as both of its shots are on disk.

Started by `mm_autofocus.refocusing.live`. It reads the file that is being written and nothing
else, and what it is to do from its standard input: one line of JSON, then ``go`` when the file
is there and ``end`` when it is closed. Its standard output is lines of JSON: how many pairs
are done once the run has ended, and last what came of it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import cv2

from mm_autofocus.errors import AutofocusError, HardwareError
from mm_autofocus.models.importing import load_refocus_model
from mm_autofocus.ometiff.following import Follower
from mm_autofocus.ometiff.recovery import open_tiff
from mm_autofocus.refocusing.fused import Fused
from mm_autofocus.refocusing.pairs import Pairing
from mm_autofocus.refocusing.recovering import How, derived_of, recover_pair
from mm_autofocus.refocusing.source import left_out, record_sha256

__all__ = ["follow", "main"]

_POLL_S = 0.2


@dataclass
class Orders:
    """What the process that runs the microscope says."""

    begun: bool = False
    ended: bool = False
    gone: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def listen(self, stream: IO[str]) -> None:
        """Read lines until there are no more."""
        for line in stream:
            with self._changed:
                self.begun |= line.strip() == "go"
                self.ended |= line.strip() == "end"
                self._changed.notify_all()
        with self._changed:
            self.gone = True
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until something is said, at most so long."""
        with self._changed:
            if not (self.ended or self.gone):
                self._changed.wait(seconds)


def follow(options: dict[str, Any], orders: Orders, tell: Any) -> dict[str, Any]:
    """Follow a file until it is closed; return what came of it.

    Parameters
    ----------
    options : dict
        ``raw, fused, model, card, raw_if_unsure, tile_px, overwrite, compression``.
    orders : Orders
        From the run.
    tell : callable
        Takes a dict, while the run has ended and this has not.
    """
    how = How(options["raw_if_unsure"], options["tile_px"])
    model = load_refocus_model(options["model"], card=options["card"])
    while not (orders.begun or orders.ended or orders.gone):
        orders.wait()
    if not orders.begun:
        return {"output": None, "pairs": 0}
    raw = Path(options["raw"])
    follower = Follower(raw)
    pairing = Pairing(raw, follower.header)
    fused = Fused(
        Path(options["fused"]),
        follower.header,
        derived_of(model, raw, version("mm-autofocus"), how),
        overwrite=options["overwrite"],
        compression=options["compression"],
    )
    busy = 0.0
    try:
        while True:
            last = orders.ended  # asked before reading: what follows is all there is
            for frame, at in follower.new():
                pair = pairing.add(frame, at)
                if pair is not None:
                    start = time.perf_counter()
                    fused.write(pair, recover_pair(model, pair, how))
                    busy += time.perf_counter() - start
                    if orders.ended:
                        tell({"done": len(fused.told)})
                if orders.gone and not orders.ended:
                    raise HardwareError("the run was killed")
            if last:
                break
            if orders.gone:
                raise HardwareError("the run was killed")
            orders.wait(_POLL_S)
        alone = pairing.alone
        if fused.told:
            fused.skip(left_out(follower.skipped, alone))
            with open_tiff(raw) as tif:
                sha256 = record_sha256(tif)
            fused.complete(source_uuid=follower.header.uuid, source_sha256=sha256)
    except BaseException:
        fused.abandon()
        raise
    return {
        "output": str(fused.path) if fused.told else None,
        "model": model.card.name,
        "pairs": len(fused.told),
        "flagged": sum(t["status"] != "ok" for t in fused.told),
        "shots_alone": len(alone),
        "megapixels_per_s": fused.pixels / 1e6 / max(busy, 1e-9),
        "tiles": fused.told,
    }


def main() -> None:
    """Do what standard input says; never returns."""
    cv2.setNumThreads(1)
    options = json.loads(sys.stdin.readline())
    orders = Orders()
    threading.Thread(target=orders.listen, args=(sys.stdin,), daemon=True).start()

    def tell(told: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()

    try:
        tell({"result": follow(options, orders, tell)})
    except AutofocusError as e:
        tell({"error": str(e)})
    except Exception as e:  # noqa: BLE001 -- the last that can be said
        tell({"error": f"{type(e).__name__}: {e}"})
    # not sys.exit: a daemon thread that waits for standard input would be in its way
    os._exit(0)
