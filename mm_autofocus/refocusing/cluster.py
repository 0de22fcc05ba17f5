"""Pairs recovered by the workers of a Dask cluster that is running already.

Each pair is a task. The workers read the raw planes themselves, from a file system that they
share with this machine; the model is sent to each once; the images come back to be written.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import AutofocusError, HardwareError, InputError
from mm_autofocus.models.card import UNSEALED, ModelCard
from mm_autofocus.models.refocus import RefocusModel
from mm_autofocus.refocusing.recovering import Done, How, recover_pair

if TYPE_CHECKING:
    from mm_autofocus.ometiff.following import PageAt
    from mm_autofocus.refocusing.pairs import Pair

__all__ = ["recover_on_cluster"]

_CONNECT_S = 5
# So many pairs per thread of the cluster are under way: enough that none waits for the
# writing, few enough for the memory here.
_AHEAD = 2


def recover_on_cluster(
    address: str,
    model: RefocusModel,
    work: Sequence[tuple[Pair, PageAt | None]],
    how: How,
    *,
    threads: int = 1,
) -> Generator[tuple[Pair, Done]]:
    """Connect, and return an iterator over the recovered pairs, in the order of `work`.

    Parameters
    ----------
    address : str
        Of the scheduler.
    model : RefocusModel
        Loaded from a file.
    work : sequence of (Pair, PageAt | None)
        Pairs, and the plane in focus where it is known.
    how : How
        For all of them.
    threads : int
        Of one run of the net.

    Raises
    ------
    InputError
        ``distributed`` is not installed, no scheduler answers, it has no workers, or these
        cannot see the files or lack this package.
    HardwareError
        A worker failed on the way.
    """
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            "--scheduler needs the package distributed; install mm-autofocus[cluster]"
        ) from None
    with _quiet():
        try:
            make: Any = Client
            client = make(address, timeout=_CONNECT_S, set_as_default=False)
        except Exception as e:  # noqa: BLE001 -- of the socket, the address, the handshake
            why = " ".join(str(e).split())[:120]
            raise InputError(
                f"--scheduler {address}: no Dask scheduler answers there ({why})"
            ) from None
    try:
        paths = sorted({at.path for pair, real in work for at in _pages(pair, real)})
        slots = _probe(client, address, paths)
    except BaseException:
        _close(client)
        raise
    return _results(client, address, model, work, how, threads, slots)


def _pages(pair: Pair, truth: PageAt | None) -> list[PageAt]:
    return [pair.lower, pair.upper, *([] if truth is None else [truth])]


def _probe(client: Any, address: str, paths: Sequence[str]) -> int:
    """Refuse workers that cannot work; return how many tasks run at once."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if not workers:
        raise InputError(f"--scheduler {address}: the scheduler has no workers")
    try:
        blind: dict[str, str] = client.run(_unseen, _sizes(paths))
    except AutofocusError:
        raise
    except Exception as e:  # noqa: BLE001 -- whatever the workers lack
        why = " ".join(str(e).split())[:160]
        raise InputError(
            f"--scheduler {address}: its workers cannot run mm_autofocus ({why}); install it "
            "there, too"
        ) from None
    for worker, path in blind.items():
        if path:
            raise InputError(
                f"--scheduler {address}: worker {worker} does not see {path} (or another file "
                "of that name); the workers must share a file system with this machine"
            )
    return sum(int(w["nthreads"]) for w in workers.values())


def _sizes(paths: Sequence[str]) -> dict[str, int]:
    return {path: Path(path).stat().st_size for path in paths}


def _unseen(sizes: dict[str, int]) -> str:
    """On a worker: a file that is not there as it is at home; ``""`` if all are."""
    for path, size in sizes.items():
        try:
            same = Path(path).stat().st_size == size
        except OSError:
            same = False
        if not same:
            return path
    return ""


def _results(
    client: Any,
    address: str,
    model: RefocusModel,
    work: Sequence[tuple[Pair, PageAt | None]],
    how: How,
    threads: int,
    slots: int,
) -> Generator[tuple[Pair, Done]]:
    under_way: deque[tuple[Pair, Any]] = deque()
    try:
        assert model.path is not None
        data = model.path.read_bytes()
        net, digest = client.scatter(data, broadcast=True), hashlib.sha256(data).hexdigest()
        # the file was verified here; its bytes do not have the checksum that a card beside has
        card = model.card.model_copy(update={"sha256": UNSEALED}).to_json()
        for pair, truth in work:
            task = client.submit(
                _task, net, digest, card, threads, pair, how, truth, pure=False
            )
            under_way.append((pair, task))
            if len(under_way) >= _AHEAD * slots:
                yield _result(address, *under_way.popleft())
        while under_way:
            yield _result(address, *under_way.popleft())
    finally:
        _close(client)


def _result(address: str, pair: Pair, task: Any) -> tuple[Pair, Done]:
    try:
        return pair, task.result()
    except AutofocusError:
        raise
    except Exception as e:  # a worker that died, a network that broke
        why = " ".join(str(e).split())[:160]
        raise HardwareError(
            f"--scheduler {address}: {pair.name} was not recovered ({why}); nothing was written"
        ) from e


def _task(
    net: bytes, digest: str, card: str, threads: int, pair: Pair, how: How, truth: PageAt | None
) -> Done:
    """On a worker: recover one pair."""
    key = (digest, card, threads)
    if key not in _models:  # once per worker, not once per pair
        _models.clear()
        _models[key] = RefocusModel(net, ModelCard.from_json(card), threads=threads)
    return recover_pair(_models[key], pair, how, truth)


_models: dict[tuple[str, str, int], RefocusModel] = {}
"""On a worker: the model that it works with."""


def _close(client: Any) -> None:
    with _quiet():
        client.close(timeout=_CONNECT_S)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what distributed logs of connections that do not come about."""
    log = logging.getLogger("distributed")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
