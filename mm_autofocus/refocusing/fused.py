"""The file that recovered images are written to: under another name until it is whole."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.ometiff.files import FileSet, Naming
from mm_autofocus.ometiff.recovery import plan_of
from mm_autofocus.ometiff.sink import OmeTiffSink

if TYPE_CHECKING:
    from mm_autofocus.ometiff.frames import FrameRecord, Header
    from mm_autofocus.refocusing.pairs import Pair
    from mm_autofocus.refocusing.recovering import Done

__all__ = ["Fused", "check_output", "part_of"]


def part_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def check_output(
    path: Path, sources: Iterable[Path], *, overwrite: bool, compression: str | None = None
) -> None:
    """Refuse an output that cannot be written, or that is one of the inputs.

    Raises
    ------
    InputError
        Nothing was written.
    """
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise InputError(f"output: {path} is the raw file itself; choose another name")
    OmeTiffSink(path, overwrite=overwrite, compression=compression).check()


class Fused:
    """Writes recovered images and what is known of each.

    Parameters
    ----------
    path : Path
        ``*.ome.tiff``; replaced when all is written.
    header : Header
        Of the source.
    derived : dict
        Of the origin; completed by `complete`.
    pairs : int | None
        How many there will be, where there is no plan in the header that says it.
    overwrite : bool
        Replace what is there.
    compression : str | None
        Lossless, as of `mm_autofocus.ometiff.OmeTiffSink`.

    Attributes
    ----------
    told : list of dict
        Of the pairs written.
    pixels : int
        Written so far.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        derived: dict[str, Any],
        *,
        pairs: int | None = None,
        overwrite: bool = False,
        compression: str | None = None,
    ) -> None:
        self.path = path
        self.told: list[dict[str, Any]] = []
        self.pixels = 0
        self._derived = dict(derived)
        self._overwrite = overwrite
        self._header = replace(
            header,
            uuid="",
            creator="mm_autofocus",
            only={**(header.only or {}), "z": 0},
            derived=self._derived,
        )
        self._plan = plan_of(self._header)
        self._pairs = pairs
        self._compression = compression
        self._files: FileSet | None = None

    def skip(self, frames: Iterable[FrameRecord]) -> None:
        """Note pairs of which a shot was left out, before the next that is written."""
        for frame in frames:
            self._open().skip(frame)

    def write(self, pair: Pair, done: Done) -> None:
        """Write one image.

        Raises
        ------
        HardwareError
            The disk failed.
        """
        frame = replace(
            pair.frame,
            z_um=done.z_um,
            shape=done.image.shape,
            dtype=done.image.dtype.name,
            recovery={k: v for k, v in done.told.items() if not k.startswith("psnr")},
        )
        try:
            self._open().write(done.image, frame)
        except OSError as e:
            raise HardwareError(f"{self.path}: cannot be written ({e.strerror or e})") from e
        self.pixels += done.image.shape[0] * done.image.shape[1]
        index = {k: v for k, v in frame.index.items() if k != "z"}
        place = {"index": index, "position": frame.name, "z_um": done.z_um}
        self.told.append(place | done.told)

    def complete(self, **facts: Any) -> None:
        """Finish the file, and give it its name.

        Parameters
        ----------
        **facts
            What else is to be said of its origin.

        Raises
        ------
        HardwareError
            The disk failed, or a file of that name has come up meanwhile.
        """
        assert self._files is not None
        flagged = sum(t["status"] != "ok" for t in self.told)
        self._derived.update(
            facts,
            delta_um=statistics.median(t["delta_um"] for t in self.told),
            pairs=len(self.told),
            flagged=flagged,
        )
        try:
            unfinished = self._files.finish()
            if unfinished is not None:
                raise unfinished
            if self.path.exists() and not self._overwrite:
                raise FileExistsError(0, "a file of that name has come up meanwhile")
            part_of(self.path).replace(self.path)
        except OSError as e:
            raise HardwareError(f"{self.path}: cannot be written ({e.strerror or e})") from e
        self._files = None

    def abandon(self) -> None:
        """Remove what was written; nothing if it is complete."""
        if self._files is not None:
            self._files.abandon()
            self._files = None

    def _open(self) -> FileSet:
        if self._files is None:
            part = part_of(self.path)
            part.unlink(missing_ok=True)  # of a process that was killed
            self._files = FileSet(
                Naming(part),
                self._header,
                self._plan,
                overwrite=False,
                compression=self._compression,
                bigtiff=None,
                frames=self._pairs,
            )
        return self._files
