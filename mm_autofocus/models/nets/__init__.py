"""Nets that predict defocus. They need torch; naming and listing them does not.

A net takes patches ``(N, looks · channels, P, P)`` float32 in 0 … 1 and returns the defocus
of the present z with its own uncertainty: see `mm_autofocus.models.nets.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import InputError
from mm_autofocus.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm_autofocus.models.nets.base import DefocusNet, NetContext

__all__ = ["NETS", "build_net", "need_torch"]

_N = "mm_autofocus.models.nets"
NETS = Registry(
    "model",
    "mm_autofocus.nets",
    {
        "sparsefocus": f"{_N}.sparsefocus:SparseFocus",
        "pg-dcn": f"{_N}.pg_dcn:PgDcn",
        "resnet": f"{_N}.resnet:ResNet",
        "convnext": f"{_N}.convnext:ConvNeXt",
    },
)
"""Classes ``(context, options)``, subclasses of `base.DefocusNet`."""


def need_torch() -> None:
    """Say how to get torch where it is missing.

    Raises
    ------
    InputError
        It is.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError(
            "training needs torch, which is not installed: pip install mm-autofocus[train]"
        ) from None


def build_net(
    name: str, context: NetContext, options: Mapping[str, Any] | None = None
) -> DefocusNet:
    """Make an untrained net.

    Parameters
    ----------
    name : str
        Name in `NETS`.
    context : NetContext
        What it is shown, and the range that it is to cover.
    options : mapping, optional
        Of this kind of net: widths, depths, ...; what is not given has its default.

    Raises
    ------
    InputError
        No such net, an unknown option or a bad value; torch is not installed.
    """
    NETS.check(name)
    need_torch()
    kind = NETS.get(name)
    net: DefocusNet = kind(context, kind.read_options(options or {}))
    return net
