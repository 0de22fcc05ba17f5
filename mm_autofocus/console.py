"""What an operator sees while a run goes on: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Protocol

    from mm_autofocus.hooks.pymmcore import AutofocusEngine

    class Done(Protocol):
        """Takes how many are done, and how many there are if that was not known before."""

        def __call__(self, done: int, of: int | None = None) -> None: ...


__all__ = [
    "RunDisplay",
    "make_console",
    "number",
    "print_tiles",
    "progress_bar",
    "tile_table",
]

_STYLE = {"ok": "green", "low-confidence": "yellow", "stale": "yellow", "failed": "red"}
# A live table longer than the terminal flickers; the file and the report have all tiles.
_LIVE_ROWS = 12

# Where there is no terminal, rich assumes 80 columns and cuts the tables.
_PLAIN_WIDTH = 150
# The narrowest column in which a clause still reads.
_WHY_WIDTH = 32

Column = tuple[str, str]
COLUMNS: tuple[Column, ...] = (
    ("tile", "position"),
    ("z before", "z_before_um"),
    ("z after", "z_after_um"),
    ("± µm", "expected_error_um"),
    ("looks", "looks"),
    ("moves", "moves"),
    ("status", "status"),
)
"""Heading and key of a record, for the columns of every table of tiles."""


def make_console(*, stderr: bool = False) -> Console:
    """Make a console as wide as its terminal; wide enough for every table elsewhere."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_PLAIN_WIDTH)


@contextmanager
def progress_bar(name: str, total: int | None = None, *, quiet: bool = False) -> Iterator[Done]:
    """Show how far a computation has come; nothing where stderr is no terminal.

    Parameters
    ----------
    name : str
        What is being done, or counted.
    total : int, optional
        How many there are, where that is known before.
    quiet : bool
        Show nothing.

    Yields
    ------
    callable
        Takes how many are done and, where that was not known, how many there are.
    """
    console = make_console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda done, of=None: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(name, total=total)
        yield lambda done, of=None: bar.update(task, completed=done, total=of)


def number(value: Any, digits: int = 2) -> str:
    """A value for a table: rounded if it is a float, ``–`` if it is None."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def print_tiles(
    records: Sequence[dict[str, Any]],
    console: Console,
    columns: Sequence[Column] = COLUMNS,
) -> None:
    """Print a table of tiles, and why some are to distrust where there is room for it.

    A clause in a narrow column would be a tower of single words: then the reasons follow the
    table, each with its tiles.
    """
    table = tile_table(records, columns, why=False)
    room = console.width - console.measure(table).maximum
    if room >= _WHY_WIDTH:
        console.print(tile_table(records, columns))
        return
    console.print(table)
    tiles: dict[str, list[str]] = {}
    for record in records:
        if reason := record.get("reason"):
            tiles.setdefault(reason, []).append(str(record.get("position")))
    for reason, names in tiles.items():
        console.print(f"{', '.join(names)}: {reason}", highlight=False, soft_wrap=True)


def tile_table(
    records: Iterable[dict[str, Any]],
    columns: Sequence[Column] = COLUMNS,
    title: str = "",
    *,
    why: bool = True,
) -> Table:
    """A table with one row per record of an autofocus."""
    table = Table(title=title or None, title_justify="left")
    for heading, key in columns:
        text = key in {"position", "status", "kind"}
        table.add_column(heading, justify="left" if text else "right", no_wrap=True)
    if why:
        table.add_column("why", overflow="fold")
    for record in records:
        style = _STYLE.get(record.get("status", ""), "")
        cells = [Text(number(record.get(key))) for _, key in columns]
        for cell, (_, key) in zip(cells, columns, strict=True):
            if key == "status":
                cell.stylize(style)
        table.add_row(*cells, *([record.get("reason") or ""] if why else []))
    return table


class RunDisplay:
    """Shows the searches of one run as they end.

    Parameters
    ----------
    console : rich.console.Console
        Where to.
    total_frames : int | None
        How many frames the plan will take, if it is known.
    quiet : bool
        Show nothing.
    """

    def __init__(
        self, console: Console, total_frames: int | None, *, quiet: bool = False
    ) -> None:
        self.console = console
        self.quiet = quiet
        self._rows: deque[dict[str, Any]] = deque(maxlen=_LIVE_ROWS)
        self._engine: AutofocusEngine | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("frames", total=total_frames)
        self._recovery: TaskID | None = None
        self._live: Live | None = None

    def connect(self, engine: AutofocusEngine) -> None:
        """Listen to an engine."""
        self._engine = engine
        engine.signals.finished.connect(self._finished)
        engine.signals.verified.connect(self._verified)

    def frame(self) -> None:
        """One more frame was taken."""
        self._progress.advance(self._task)
        self._refresh()

    def recovered(self, tiles: int) -> None:
        """So many tiles are recovered; the run itself has ended."""
        if self._recovery is None:
            self._recovery = self._progress.add_task("recovered tiles", total=None)
        self._progress.update(self._recovery, completed=tiles)
        self._refresh()

    def __enter__(self) -> RunDisplay:
        if not self.quiet and self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _finished(self, record: dict[str, Any]) -> None:
        self._rows.append(record)
        if self._live is None and not self.quiet:
            why = f"  {record['reason']}" if record["reason"] else ""
            self.console.print(
                f"{record['position']}: z {record['z_before_um']:.2f} → "
                f"{record['z_after_um']:.2f} µm, {record['looks']} looks, "
                f"{record['status']}{why}",
                highlight=False,
                soft_wrap=True,
            )
        self._refresh()

    def _verified(self, record: dict[str, Any]) -> None:
        again = record.get("corrections")  # none where a shadow looked on
        if again and self._live is None and not self.quiet:
            self.console.print(
                f"{record['position']}: its frame was out of focus, taken again at z "
                f"{record['z_after_um']:.2f} µm, {record['status']}"
                if record["details"]["verification"]["kept"]
                else f"{record['position']}: its frame was taken again, the first was better",
                highlight=False,
                soft_wrap=True,
            )
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(Group(tile_table(self._rows), self._progress))
