"""Recover while a run goes on, in a process of its own that never slows it.

The run tells it twice that something has happened: that the file is there, and that it is
closed. It reads the rest from the file, so that nothing is queued, copied or waited for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.models.refocus import TILE_PX
from mm_autofocus.ometiff.files import SUFFIXES
from mm_autofocus.refocusing.fused import check_output, part_of
from mm_autofocus.refocusing.running import load_chosen

if TYPE_CHECKING:
    from mm_autofocus.types import FrameFormat

__all__ = ["Live", "fused_name"]


# It steps back before it imports anything: everything else on this machine comes first. And
# Ctrl-C, which reaches it, too, is for the run; it ends after that.
_WORKER = (
    "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "getattr(os, 'nice', int)(19); "
    "from mm_autofocus.refocusing.worker import main; main()"
)


def fused_name(raw: Path) -> Path:
    """``OUT_fused.ome.tiff`` beside ``OUT.ome.tiff``."""
    suffix = next((s for s in SUFFIXES if raw.name.lower().endswith(s)), raw.suffix)
    stem = raw.name[: len(raw.name) - len(suffix)]
    return raw.with_name(f"{stem}_fused{raw.name[len(stem) :]}")


class Live:
    """A run's second file, written beside it.

    Parameters
    ----------
    raw : Path
        That the run will write.
    fused : Path | None
        To write; None: `fused_name`.
    model : str or Path, optional
        As for `mm_autofocus.refocus`.
    raw_if_unsure : bool
        Keep the sharper shot where there is a reason to distrust the recovered image.
    overwrite : bool
        Replace what is there.
    compression : str | None
        Of the planes.

    Raises
    ------
    InputError
        There is no such model, or the output cannot be written.
    """

    def __init__(
        self,
        raw: Path,
        fused: Path | None = None,
        *,
        model: str | Path | None = None,
        raw_if_unsure: bool = False,
        overwrite: bool = False,
        compression: str | None = None,
    ) -> None:
        self.raw, self.fused = raw, fused_name(raw) if fused is None else Path(fused)
        if self.fused.absolute() == raw.absolute():
            raise InputError(f"refocus_output: {self.fused} is the raw file itself")
        check_output(self.fused, [raw], overwrite=overwrite, compression=compression)
        self._model = load_chosen(model)
        self._options = {
            "raw": str(raw.absolute()),
            "fused": str(self.fused.absolute()),
            "model": str(self._model.path),
            "card": None,
            "raw_if_unsure": raw_if_unsure,
            "tile_px": TILE_PX,
            "overwrite": overwrite,
            "compression": compression,
        }
        self._process: subprocess.Popen[str] | None = None
        self._complaints: IO[str] | None = None
        self._begun = False

    def check(self, frames: FrameFormat, delta_um: float) -> None:
        """Refuse a microscope or a plan whose shots the model cannot be shown.

        Raises
        ------
        InputError
            Channels, pixel type, bit depth, pixel size or ΔD are not the model's.
        """
        self._model.check_type(frames.dtype)
        self._model.check(
            frames.shape,
            half_um=delta_um,
            max_value=frames.max_value,
            pixel_size_um=frames.optics.pixel_size_um,
        )

    def start(self) -> None:
        """Start the process; it waits for the file."""
        # a module of its own, not multiprocessing: that would import the caller's script anew
        idle = getattr(subprocess, "IDLE_PRIORITY_CLASS", 0)  # of Windows
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            encoding="utf-8",
            creationflags=idle,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._say(json.dumps(self._options))

    def written(self, frames: int) -> None:
        """One more frame is in the file; called by the thread that writes it."""
        if not self._begun:
            self._begun = True
            self._say("go")

    def finish(self, on_pair: Callable[[int], object] | None = None) -> dict[str, Any]:
        """Wait until all pairs of the closed file are recovered.

        Parameters
        ----------
        on_pair : callable, optional
            Called with the number of pairs that are done.

        Returns
        -------
        dict
            ``output, model, pairs, flagged, shots_alone, megapixels_per_s, tiles``.

        Raises
        ------
        HardwareError
            The process died or could not do it; the raw file has nothing to do with it.
        """
        process = self._process
        assert process is not None
        assert process.stdout is not None
        self._say("end")
        error = ""
        try:
            for line in process.stdout:
                told = json.loads(line)
                if "result" in told:
                    found: dict[str, Any] = told["result"]
                    return found
                error = told.get("error", "")
                if on_pair is not None and "done" in told:
                    on_pair(told["done"])
            raise HardwareError(f"refocus live: {error or self._why_dead()}")
        finally:
            self.stop()

    def stop(self) -> None:
        """End the process, whatever it is doing; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not yet sent to one that has died
                    pipe.close()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._complaints is not None:
            self._complaints.close()
        part_of(self.fused).unlink(missing_ok=True)

    def _say(self, line: str) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        with suppress(OSError, ValueError):  # it has died; `finish` says so
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _why_dead(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        text = ""
        if self._complaints is not None:
            self._complaints.seek(0)
            lines = [x.strip() for x in self._complaints.read().splitlines() if x.strip()]
            text = f": {lines[-1]}" if lines else ""
        return f"its process died with exit code {code}{text}"
