"""Checkpoints of a run: everything needed to go on, and nothing that runs code when read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm_autofocus.errors import InputError
from mm_autofocus.models.nets import build_net
from mm_autofocus.models.nets.base import NetContext

if TYPE_CHECKING:
    from mm_autofocus.models.nets.base import Net

__all__ = ["BEST", "LAST", "find_checkpoint", "load_checkpoint", "net_of", "save_checkpoint"]

BEST, LAST = "best.ckpt", "last.ckpt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that at any moment either the old or the new one is there."""
    temporary = path.with_name(path.name + ".new")
    torch.save(state, temporary)
    temporary.replace(path)


def find_checkpoint(run: Path, which: str = BEST) -> Path:
    """The checkpoint of a run, or the file itself.

    Raises
    ------
    InputError
        There is none.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise InputError(f"{run}: no such run; name the folder that train wrote")
    for name in (which, LAST):
        if (run / name).is_file():
            return run / name
    raise InputError(f"{run}: is no run; it has neither {BEST} nor {LAST}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises
    ------
    InputError
        It is missing, damaged, or something else.
    """
    try:
        # weights_only: tensors and plain values, so that no stranger's file runs code
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["model"], state["context"], state["weights"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as e:
        raise _damaged(path, e) from None
    except pickle.UnpicklingError as e:
        raise _damaged(path, e) from None
    return dict(state)


def _damaged(path: Path, e: Exception) -> InputError:
    why = str(e).splitlines()[0] if str(e) else type(e).__name__
    return InputError(f"{path}: does not read as a checkpoint of train ({why})")


def net_of(state: dict[str, Any]) -> Net:
    """The net of a checkpoint with its (averaged) weights, ready to predict."""
    net = build_net(state["model"], NetContext(**state["context"]), state["net"])
    net.load_state_dict(state["weights"])
    return net.eval()
