"""Nets that predict defocus or recover the sharp image. They need torch; listing them does not.

The first kind takes patches ``(N, looks · channels, P, P)`` float32 in 0 … 1 and returns the
defocus of the present z with its own uncertainty: see `mm_autofocus.models.nets.base`. The
second takes two shots and returns the image in focus: `mm_autofocus.models.nets.refocus`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import InputError
from mm_autofocus.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm_autofocus.models.nets.base import Net, NetContext

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
        "tsva": f"{_N}.tsva:Tsva",
        "unet": f"{_N}.tsva:UNet",
        "nafnet": f"{_N}.nafnet:NafNet",
    },
)
"""Classes ``(context, options)``, subclasses of `base.Net`."""


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


def build_net(name: str, context: NetContext, options: Mapping[str, Any] | None = None) -> Net:
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
    net: Net = kind(context, kind.read_options(options or {}))
    return net
