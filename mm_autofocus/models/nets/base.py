"""What all nets share: what they are shown, what they return, how their options are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from mm_autofocus.errors import InputError
from mm_autofocus.registry import suggest

__all__ = [
    "AnyOptions",
    "DefocusNet",
    "Net",
    "NetContext",
    "NetOptions",
    "Output",
    "Standardise",
    "count_of",
    "full_precision",
]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class NetContext(BaseModel):
    """What a net is shown and what it is to cover; the data decide it, not the user.

    Attributes
    ----------
    looks_um : tuple of float
        Offsets of the looks from the present z.
    channels : {1, 3}
        Per look.
    range_um : tuple of float
        Smallest and largest defocus that it is trained on; of two shots, of their middle.
    half_um : tuple of float | None
        Two shots: smallest and largest distance of each from their middle.
    patch_px : int
        Edge of a patch at run time.
    na, wavelength_um, pixel_size_um : float | None
        Optics, where they are known.
    """

    model_config = _STRICT

    looks_um: tuple[float, ...] = (0.0,)
    channels: Literal[1, 3] = 1
    range_um: tuple[float, float] = (-25.0, 25.0)
    half_um: tuple[float, float] | None = None
    patch_px: int = 224
    na: float | None = None
    wavelength_um: float | None = None
    pixel_size_um: float | None = None

    @property
    def in_channels(self) -> int:
        """Channels of a patch: looks times channels, look by look."""
        return len(self.looks_um) * self.channels


class AnyOptions(BaseModel):
    """Options of a net; a subclass names them."""

    model_config = _STRICT


class NetOptions(AnyOptions):
    """Options that every net for the defocus has.

    Attributes
    ----------
    standardise : {"concat", "only", "none"}
        Whether the net sees, beside the values themselves, the values less their mean over
        the standard deviation of the patch. Far from focus contrast is tiny.
    head : {"bins", "gaussian"}
        A distribution over bins of defocus, or a mean with a standard deviation.
    bin_um : float
        Width of a bin.
    readout : {"mode", "mean"}
        Of the bins: the mean about the highest one, or of all. A net that is in doubt about
        the sign has two peaks; their mean is no guess at all.
    """

    standardise: Literal["concat", "only", "none"] = "concat"
    head: Literal["bins", "gaussian"] = "bins"
    bin_um: float = 0.5
    readout: Literal["mode", "mean"] = "mode"


class Output(NamedTuple):
    """What a net returns.

    Attributes
    ----------
    defocus : Tensor
        ``(N,)``, µm, of the present z; positive above focus.
    log_sd : Tensor
        ``(N,)``, natural logarithm of its standard deviation in µm.
    extra : dict
        What the loss of this net needs besides.
    """

    defocus: Tensor
    log_sd: Tensor
    extra: dict[str, Tensor]


class Net(nn.Module):
    """Base of all nets: a task, options, and what is minimised.

    Attributes
    ----------
    task : {"defocus", "refocus"}
        What it answers.
    """

    Options: ClassVar[type[AnyOptions]]
    task: ClassVar[Literal["defocus", "refocus"]]

    def __init__(self, context: NetContext, options: AnyOptions) -> None:
        super().__init__()
        self.context, self.options = context, options

    @classmethod
    def read_options(cls, given: Mapping[str, Any]) -> AnyOptions:
        """Check options.

        Raises
        ------
        InputError
            An unknown one, or a bad value; names it and what is allowed.
        """
        allowed = list(cls.Options.model_fields)
        for key in given:
            if key not in allowed:
                raise InputError(
                    f"net.{key}: is unknown{suggest(key, allowed)}; allowed: "
                    f"{', '.join(allowed)}"
                )
        try:
            return cls.Options(**given)
        except ValidationError as e:
            first = e.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"net.{key}: {first['input']!r} is not allowed: {first['msg']}"
            ) from None

    def losses_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parts of the loss of a batch of samples, weighted; their sum is minimised."""
        raise NotImplementedError


class DefocusNet(Net):
    """Base of the nets that predict defocus.

    A subclass sets `Options` and implements `forward` and `losses`. `rin` is None, or a
    module from a mosaic ``(M, C, rows · 56, columns · 56)`` to logits ``(M, rows, columns)``.
    """

    Options: ClassVar[type[AnyOptions]] = NetOptions
    task = "defocus"

    def __init__(self, context: NetContext, options: NetOptions) -> None:
        super().__init__(context, options)
        self.options: NetOptions = options
        # not as an attribute of the class: torch would never look behind it
        self.rin: nn.Module | None = None

    def forward(self, patches: Tensor) -> Output:
        """Predict the defocus of patches ``(N, C, P, P)``, float32 in 0 … 1."""
        raise NotImplementedError

    def losses(self, output: Output, defocus_um: Tensor) -> dict[str, Tensor]:
        """Parts of the loss, weighted; their sum is minimised.

        Parameters
        ----------
        output : Output
            From `forward`.
        defocus_um : Tensor
            ``(N,)``, the labels.
        """
        raise NotImplementedError

    def losses_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`losses` of patches, and that of the importance where mosaics came with them."""
        told = {"lens": batch["lens"]} if "lens" in batch else {}
        losses = self.losses(self(batch["patches"], **told), batch["defocus_um"])
        if "mosaic" in batch and self.rin is not None:
            logits = self.rin(batch["mosaic"]).float()
            losses["importance"] = nn.functional.binary_cross_entropy_with_logits(
                logits, batch["importance"]
            )
        return losses


class Standardise(nn.Module):
    """Put standardised values beside the values themselves, or in their place.

    Each channel loses its own mean, but all are divided by one standard deviation, so that
    what the looks and colours differ by in contrast stays. Beside both, a plane holds the
    logarithm of that standard deviation: how little contrast is left tells how far away
    focus is.
    """

    def __init__(self, how: Literal["concat", "only", "none"], channels: int) -> None:
        super().__init__()
        self.how = how
        self.out_channels = channels * 2 + 1 if how == "concat" else channels

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, P, P)`` to ``(N, C or 2 C + 1, P, P)``."""
        if self.how == "none":
            return x
        off = x - x.mean((2, 3), keepdim=True)
        sd = off.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-3  # noise at 8 bits
        unit = off / sd
        if self.how == "only":
            return unit
        return torch.cat((x, unit, (sd.log() + 3).expand_as(x[:, :1])), 1)


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which products are not rounded to 8 bits, whatever the training does."""
    return torch.autocast(x.device.type, enabled=False)


def count_of(range_um: tuple[float, float], step_um: float) -> int:
    """How many bins of `step_um` cover a range, half a bin beyond its ends included."""
    return max(2, math.ceil((range_um[1] - range_um[0]) / step_um) + 1)
