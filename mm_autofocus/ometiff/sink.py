"""The streaming sink: frames in, OME-TIFF out, in bounded memory."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.ometiff.conveyor import Conveyor
from mm_autofocus.ometiff.files import SUFFIXES, FileSet, Naming
from mm_autofocus.ometiff.frames import Focus, FrameRecord, Header, ImageKey, finite
from mm_autofocus.ometiff.header import make_header
from mm_autofocus.ometiff.layout import Plan, describe_index
from mm_autofocus.ometiff.pages import COMPRESSIONS, DTYPES

if TYPE_CHECKING:
    import numpy.typing as npt
    import useq
    from pymmcore_plus.metadata.schema import FrameMetaV1, SummaryMetaV1

    from mm_autofocus.types import Optics

    _Item: TypeAlias = tuple[npt.NDArray[Any] | None, FrameRecord]
    """A frame on its way to the writer thread; without an image, one that is left out."""

__all__ = ["OmeTiffSink"]

logger = logging.getLogger(__name__)

_RECORD = "mm_autofocus"
"""Key of the autofocus record in the metadata of a frame."""


class OmeTiffSink:
    """Writes an acquisition to OME-TIFF while it runs.

    Frames are handed to a thread through a queue of bounded size; when the disk is
    slower than the camera, `append` waits. Each frame becomes a page of the file, with
    all that is known of it in a private tag, and is given to the operating system before
    it is counted: a process that is killed loses the queue but no frame that was
    reported as written.

    Parameters
    ----------
    path : str or Path
        ``*.ome.tif`` or ``*.ome.tiff``.
    overwrite : bool
        Replace what is there, when the first frame arrives.
    split_positions : bool
        One file per position, ``out_p0003.ome.tiff`` beside each other.
    compression : {None, "zlib", "lzw", "zstd"}
        Lossless. lzw and zstd need the package imagecodecs.
    queue_mib : float
        Size of the queue. One frame may always be in it.
    bigtiff : bool | None
        None: as needed (above 3.9 GiB, or if the plan does not know its length).
    creator : str
        Program named in the file.

    Attributes
    ----------
    frames_written : int
        Frames given to the operating system.
    on_written : callable | None
        Called with `frames_written` from the writer thread.
    paths : list of Path
        Files written so far.

    Examples
    --------
    >>> sink = OmeTiffSink("out.ome.tiff")                           # doctest: +SKIP
    >>> sink.check()                                                 # doctest: +SKIP
    >>> sink.setup(sequence, summary_meta)                           # doctest: +SKIP
    >>> sink.append(image, event, frame_meta)                        # doctest: +SKIP
    >>> sink.close()                                                 # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        split_positions: bool = False,
        compression: str | None = None,
        queue_mib: float = 256,
        bigtiff: bool | None = None,
        creator: str = "mm_autofocus",
    ) -> None:
        self.path = Path(path)
        self.frames_written = 0
        self.on_written: Callable[[int], object] | None = None
        self._naming = Naming(self.path, split_positions)
        self._overwrite = overwrite
        self._compression = None if compression in (None, "none") else compression
        self._queue_bytes = int(queue_mib * 2**20)
        self._bigtiff = bigtiff
        self._creator = creator

        self._header: Header | None = None
        self._plan: Plan | None = None
        self._files: FileSet | None = None
        self._conveyor: Conveyor[_Item] | None = None
        self._next_planned = 0
        self._formats: dict[ImageKey, tuple[tuple[int, ...], str]] = {}
        self._taken: set[tuple[Any, ...]] = set()
        self._last_t: dict[tuple[Any, ...], int] = {}
        self._warned_twice = False
        self._unnamed = 0
        self._fault_told = False
        self._closed = False

    @property
    def paths(self) -> list[Path]:
        """Files written so far, in the order in which they were begun."""
        return [] if self._files is None else self._files.paths

    # ---- before the run ----------------------------------------------------------------

    def check(self) -> None:
        """Refuse what cannot work, before anything is written.

        Raises
        ------
        InputError
            The name has the wrong ending, the folder is missing or not writable, the
            file exists, or the compression is unknown or its package is missing.
        """
        path, name = self.path, self.path.name.lower()
        if not name.endswith(SUFFIXES):
            raise InputError(f"output: {path} must end with {' or '.join(SUFFIXES)}")
        folder = path.parent
        if not folder.is_dir():
            raise InputError(f"output: the folder {folder} does not exist")
        if not os.access(folder, os.W_OK):
            raise InputError(f"output: the folder {folder} is not writable")
        if path.is_dir():
            raise InputError(f"output: {path} is a folder")
        if not self._overwrite and (old := self._naming.existing()):
            raise InputError(
                f"output: {old[0]} exists; choose another name or allow overwriting"
            )
        if self._compression is not None:
            if self._compression not in COMPRESSIONS:
                raise InputError(
                    f"compression: {self._compression!r} is not one of none, "
                    f"{', '.join(COMPRESSIONS)}"
                )
            # zlib's data pass through imagecodecs, too, where differences are taken
            if importlib.util.find_spec("imagecodecs") is None:
                raise InputError(
                    f"compression: {self._compression!r} needs the package imagecodecs; "
                    "install mm-autofocus[compression]"
                )

    def setup(
        self,
        sequence: useq.MDASequence,
        meta: SummaryMetaV1 | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        optics: Optics | None = None,
    ) -> None:
        """Prepare for a run; no file is made before the first frame.

        Parameters
        ----------
        sequence : useq.MDASequence
            The plan; it is left untouched.
        meta : dict | None
            Summary metadata of pymmcore-plus.
        settings : mapping | None
            Of the autofocus, JSON-able; saved in the file.
        optics : Optics | None
            Saved in the file.

        Raises
        ------
        InputError
            As in `check`, and if the sink has been used before.
        """
        if self._header is not None:
            raise InputError("this sink has had its run; make a new one for the next")
        self.check()
        summary: Mapping[str, Any] = meta or {}
        info: Any = (summary.get("image_infos") or ({},))[0]
        self._plan = Plan.from_sequence(
            sequence, int(info.get("num_camera_adapter_channels", 1))
        )
        self._header = make_header(
            sequence,
            self._plan,
            summary,
            settings=settings,
            optics=optics,
            creator=self._creator,
        )
        self._warn_if_too_large(info)
        self._files = FileSet(
            self._naming,
            self._header,
            self._plan,
            overwrite=self._overwrite,
            compression=self._compression,
            bigtiff=self._bigtiff,
        )
        self._conveyor = Conveyor(self.path.name, self._write, self._queue_bytes)

    def _warn_if_too_large(self, info: Mapping[str, Any]) -> None:
        try:
            frame = int(np.prod(info["plane_shape"])) * np.dtype(info["dtype"]).itemsize
        except (KeyError, TypeError):
            return
        need = frame * len(self._plan or ())
        free = shutil.disk_usage(self.path.parent).free
        if self._compression is None and need > free:
            logger.warning(
                "%s: the plan needs %.1f GiB, the disk has %.1f GiB free",
                self.path,
                need / 2**30,
                free / 2**30,
            )

    # ---- during the run ----------------------------------------------------------------

    def append(
        self, img: npt.NDArray[Any], event: useq.MDAEvent, meta: FrameMetaV1 | Mapping[str, Any]
    ) -> None:
        """Take one frame; waits while the queue is full.

        Parameters
        ----------
        img : numpy.ndarray
            ``(Y, X)``, or ``(Y, X, 3)`` RGB. It must not be written to afterwards; a
            view of another array is copied.
        event : useq.MDAEvent
            Its index says where the frame belongs.
        meta : dict
            Frame metadata of pymmcore-plus; ``meta["mm_autofocus"]`` is its autofocus
            record.

        Raises
        ------
        HardwareError
            The disk failed, or the camera gives frames of another size or type within
            one image. The frame is not saved; those before are.
        """
        self._ready()
        img = np.asarray(img)
        if img.dtype.name not in DTYPES or not (
            img.ndim == 2 or (img.ndim == 3 and img.shape[2] == 3)
        ):
            raise HardwareError(
                f"{self.path}: cannot save a frame of shape {img.shape} and type {img.dtype}; "
                f"it must be (Y, X) or (Y, X, 3) of {', '.join(DTYPES)}"
            )
        frame = self._record(event, meta)
        frame.shape, frame.dtype = img.shape, img.dtype.name
        expected = self._formats.setdefault(frame.key, (frame.shape, frame.dtype))
        if expected != (frame.shape, frame.dtype):
            raise HardwareError(
                f"{self.path}: the frame at {describe_index(frame.index)} is "
                f"{frame.shape} {frame.dtype}, but the frames of this position before it "
                f"are {expected[0]} {expected[1]}"
            )
        self._find_place(frame)
        # a view may show a buffer that its owner uses again
        order = img.dtype.newbyteorder("=")
        if not img.flags.owndata:
            img = np.array(img, order, order="C")
        img = np.ascontiguousarray(img, order)
        self._put((img, frame), img.nbytes)

    def skip(
        self,
        event: useq.MDAEvent | None = None,
        *,
        frames: int = 1,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Note that frames are left out; the file keeps its shape.

        Parameters
        ----------
        event : useq.MDAEvent | None
            The (first) one left out; with a sequence of events, all of them. None: those
            that come next in the plan.
        frames : int
            How many, counting each camera.
        record : mapping | None
            The autofocus record that says why.
        """
        self._ready()
        focus = self._focus(record)
        for left in self._left_out(event, frames):
            if event is not None:
                left.name = left.name or event.pos_name or ""
            left.focus = focus
            self._put((None, left), 0)

    def close(self) -> None:
        """Write what is queued, complete the files and close them.

        Idempotent. Leaves readable files, whatever happened.

        Raises
        ------
        HardwareError
            Something was not saved, and no call before has said so.
        """
        if self._closed:
            return
        self._closed = True
        if self._conveyor is None or self._files is None:
            return
        self._conveyor.end()
        fault = self._conveyor.fault
        unfinished = self._files.finish("" if fault is None else str(fault))
        if not self._files.paths and fault is None:
            logger.warning("%s: not one frame arrived; there is no file", self.path)
        if unfinished is not None:
            self._fault_told = True
            raise HardwareError(
                f"{self.path}: all {self.frames_written} frames are saved, but the file could "
                f"not be completed ({unfinished}); `mm-autofocus inspect --repair` does it"
            ) from unfinished
        if fault is not None and not self._fault_told:
            self._raise_fault()

    def get_view(self) -> None:
        """No live view; part of the protocol of pymmcore-plus sinks."""

    # ---- on the acquisition thread -----------------------------------------------------

    def _ready(self) -> None:
        if self._conveyor is None:
            raise InputError("setup() must come before the first frame")
        if self._conveyor.fault is not None:
            self._raise_fault()
        if self._closed:
            raise InputError(f"{self.path}: the file is closed")

    def _put(self, item: _Item, size: int) -> None:
        assert self._conveyor is not None
        if not self._conveyor.put(item, size):
            self._raise_fault()

    def _raise_fault(self) -> None:
        assert self._conveyor is not None
        self._fault_told = True
        fault = self._conveyor.fault
        what = f"writing failed ({fault})"
        if isinstance(fault, OSError) and fault.errno == errno.ENOSPC:
            what = "the disk is full"
        raise HardwareError(
            f"{self.path}: {what}; the first {self.frames_written} frames are saved"
        ) from fault

    def _record(self, event: useq.MDAEvent, meta: Mapping[str, Any]) -> FrameRecord:
        position = meta.get("position") or {}
        time_ms = finite(meta.get("runner_time_ms"))
        size = finite(meta.get("pixel_size_um"))
        return FrameRecord(
            index={str(k): int(v) for k, v in event.index.items()},
            name=event.pos_name or "",
            channel=event.channel.config if event.channel else "",
            camera=str(meta.get("camera_device") or ""),
            time_s=None if time_ms is None or time_ms < 0 else time_ms / 1000,
            exposure_ms=finite(meta.get("exposure_ms")),
            x_um=finite(position.get("x")),
            y_um=finite(position.get("y")),
            z_um=finite(position.get("z")),
            pixel_size_um=size or None,
            focus=self._focus(meta.get(_RECORD)),
        )

    def _focus(self, record: Mapping[str, Any] | None) -> Focus | None:
        if not record:
            return None
        focus = dict(record)
        if focus.get("focus_id") is None:
            focus["focus_id"] = f"unnamed-{self._unnamed}"
            self._unnamed += 1
        return focus

    def _find_place(self, frame: FrameRecord) -> None:
        """Count the frame; one whose place is taken goes to the next free time point."""

        def place() -> tuple[Any, ...]:
            return frame.key, frame.at("t"), frame.at("c"), frame.at("z"), frame.at("cam")

        if place() in self._taken:
            series = (frame.key, frame.at("c"), frame.at("z"), frame.at("cam"))
            if self._plan is not None and not self._warned_twice:
                self._warned_twice = True
                logger.warning(
                    "%s: a second frame at %s; it and others like it are appended in time",
                    self.path,
                    describe_index(frame.index),
                )
            t = self._last_t.get(series, 0)
            while place() in self._taken:
                t += 1
                frame.index["t"] = t
            self._last_t[series] = t
        self._taken.add(place())
        if self._plan is not None:
            rank = self._plan.rank(frame.index)
            if rank is not None:
                self._next_planned = rank + 1

    def _left_out(self, event: useq.MDAEvent | None, frames: int) -> list[FrameRecord]:
        """Find the frames that `skip` names, with what the plan says of them."""
        assert self._header is not None
        plan, n_cameras = self._plan, self._header.n_cameras
        start = self._next_planned
        if event is not None:
            events = list(getattr(event, "events", ())) or [event]
            indices = [dict(e.index) for e in events]
            if n_cameras > 1 and "cam" not in indices[0]:
                indices = [{**i, "cam": cam} for i in indices for cam in range(n_cameras)]
            frames = max(frames, len(indices))
            rank = None if plan is None else plan.rank(indices[0])
            if rank is None:
                return [FrameRecord(index=index) for index in indices]
            start = rank
        if plan is None:
            logger.warning("%s: %d frames were skipped, no one knows which", self.path, frames)
            return []
        self._next_planned = min(start + frames, len(plan))
        return [plan.frame(rank) for rank in range(start, self._next_planned)]

    # ---- on the writer thread ----------------------------------------------------------

    def _write(self, item: _Item) -> None:
        assert self._files is not None
        image, frame = item
        if image is None:
            self._files.skip(frame)
            return
        self._files.write(image, frame)
        self.frames_written += 1
        if self.on_written is None:
            return
        try:
            self.on_written(self.frames_written)
        except Exception:
            logger.exception("%s: the callback on_written failed; not called again", self.path)
            self.on_written = None
