"""What the virtual microscope knows and nothing that focuses may ask.

Two truths. By *geometry*: the height of the middle of the specimen under the optical axis,
or on average over the field. By *measure*: where Brenner's measure, the focus measure used
at run time, is largest on images without noise, dust and shading. They differ by some tenths
of a micrometre, because phase and spherical aberration move the sharpest plane; a focus
measure can find the second, so results are judged by it.

All heights are true heights of the stage: what its encoder reads differs by backlash,
repeatability and drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.metrics import brenner
from mm_autofocus.sim.base import VirtualDevice
from mm_autofocus.sim.render import heights

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.sim.microscope import Exposure, Microscope
    from mm_autofocus.sim.render import View
    from mm_autofocus.sim.slide import SlideSettings

    Measure: TypeAlias = Callable[[npt.NDArray[Any]], float]

__all__ = [
    "defocus_um",
    "focus_curve",
    "frame_in_focus",
    "geometric_focus_um",
    "luminance",
    "measured_focus_um",
    "microscope_of",
    "present_view",
]

# what `measured_focus_um` found, without the objective's parfocal offset
_found: dict[tuple[SlideSettings, View, Measure], float] = {}
_KEPT = 4096

LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def microscope_of(core: Any) -> Microscope:
    """Find the virtual microscope whose devices a core has loaded.

    Parameters
    ----------
    core : UniMMCore
        A core with virtual devices.

    Raises
    ------
    InputError
        If it has none, or those of more than one microscope.
    """
    devices = getattr(core, "_pydevices", {})
    found = {
        id(d.scope): d.scope
        for d in (devices[label] for label in devices)
        if isinstance(d, VirtualDevice)
    }
    if len(found) != 1:
        raise InputError(
            f"core: it has the devices of {len(found)} virtual microscopes, not of 1"
        )
    return next(iter(found.values()))


def present_view(scope: Microscope) -> View:
    """What is in view now."""
    return scope.view(*scope.true_xy_um())


def geometric_focus_um(
    scope: Microscope,
    x_um: float | None = None,
    y_um: float | None = None,
    *,
    view: View | None = None,
) -> float:
    """Height of the stage at which a point of the slide is in focus, by geometry.

    Parameters
    ----------
    scope : Microscope
        The microscope; its objective's parfocal offset is included.
    x_um, y_um : float, optional
        Point of the slide.
    view : View, optional
        Instead of a point: the mean over a field, its field curvature included. Neither: over
        what is in view now.

    Returns
    -------
    float
        True height of the stage in µm.
    """
    parfocal = scope.objectives[scope.objective].parfocal_um
    if x_um is not None and y_um is not None:
        return scope.slide.height_at(x_um, y_um) + parfocal
    return float(heights(scope.slide, view or present_view(scope)).mean()) + parfocal


def luminance(light: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Grey image of a colour image, by Rec. 601."""
    if light.ndim == 2:
        return light
    return np.asarray(light @ LUMINANCE, np.float32)


def focus_curve(
    scope: Microscope,
    z_um: npt.ArrayLike,
    *,
    view: View | None = None,
    measure: Measure = brenner,
) -> npt.NDArray[np.float64]:
    """Focus measure of the noiseless image at true heights of the stage.

    Parameters
    ----------
    scope : Microscope
        The microscope.
    z_um : array_like
        Heights in µm.
    view : View, optional
        What is in view; default: now.
    measure : callable
        Takes ``(Y, X)`` float32, 255 where a blank field is.

    Returns
    -------
    numpy.ndarray
        One value for each height.
    """
    view = view or present_view(scope)
    parfocal = scope.objectives[scope.objective].parfocal_um
    light = (
        scope.renderer.image(view, float(z) - parfocal)
        for z in np.atleast_1d(np.asarray(z_um, float))
    )
    return np.array([measure(255 * luminance(image)) for image in light])


def measured_focus_um(
    scope: Microscope,
    *,
    view: View | None = None,
    measure: Measure = brenner,
    quality: str | None = None,
) -> float | None:
    """Height of the stage at which the focus measure of the noiseless image is largest.

    It is looked for within ± 2 depths of field of the geometric focus, and up to ± 4 where the
    best lies at the end: in steps of two thirds of one, which no peak of the measure fits
    between, then on either side of the best half as far, and half again, and by a parabola
    through the best and its neighbours: 11 images, most times. What was found of a slide and a
    view is kept, as it is the same each time.

    Parameters
    ----------
    scope : Microscope
        The microscope.
    view : View, optional
        What is in view; default: now.
    measure : callable
        As in :func:`focus_curve`.
    quality : str, optional
        Quality of the images; default: that of the view.

    Returns
    -------
    float | None
        True height of the stage in µm; None if the field is blank.
    """
    view = view or present_view(scope)
    if quality is not None:
        view = replace(view, quality=quality)
    size = (view.shape[1] * view.pitch_um, view.shape[0] * view.pitch_um)
    if scope.slide.sparsity(view.x_um, view.y_um, size) == "blank":
        return None
    parfocal = scope.objectives[scope.objective].parfocal_um
    key = (scope.slide.settings, view, measure)
    height = _found.get(key)
    if height is None:
        height = _search(scope, view, measure) - parfocal
        if len(_found) >= _KEPT:
            _found.clear()
        _found[key] = height
    return height + parfocal


def _search(scope: Microscope, view: View, measure: Measure) -> float:
    """See `measured_focus_um`."""
    grid = view.dof_um / 6
    middle = geometric_focus_um(scope, view=view)
    seen: dict[int, float] = {}

    def look(points: Iterable[int]) -> int:
        """Measure at points of the grid not seen yet; the best of all."""
        new = [i for i in points if i not in seen and abs(i) <= 24]
        values = focus_curve(scope, middle + grid * np.array(new), view=view, measure=measure)
        seen.update(zip(new, values.tolist(), strict=True))
        return max(seen, key=lambda i: seen[i])

    top = look(range(-12, 13, 4))
    while abs(top) == max(seen) and max(seen) < 24:
        top = look((min(seen) - 4, max(seen) + 4))
    for step in (2, 1):
        top = look((top - step, top + step))
    top = min(max(top, -23), 23)  # at the end of the range: the parabola through the last three
    a, b, c = (seen[i] for i in (top - 1, top, top + 1))
    bend = a - 2 * b + c
    shift = 0.5 * (a - c) / bend if bend < 0 else 0.0
    return float(middle + grid * (top + np.clip(shift, -1, 1)))


def defocus_um(
    scope: Microscope,
    exposure: Exposure | None = None,
    *,
    by: Literal["measure", "geometry"] = "measure",
) -> float | None:
    """True defocus ``z_image - z_focus`` of a frame, or of the microscope as it stands.

    Parameters
    ----------
    scope : Microscope
        The microscope.
    exposure : Exposure, optional
        One of ``scope.exposures``; default: as it stands now.
    by : {"measure", "geometry"}
        Which truth.

    Returns
    -------
    float | None
        In µm, positive above focus; None if the field is blank (by measure).
    """
    z = scope.true_z_um() if exposure is None else exposure.z_um
    view = present_view(scope) if exposure is None else exposure.view
    if exposure is not None:
        here = scope.objectives[scope.objective].parfocal_um
        z += here - exposure.parfocal_um  # both truths use the objective in use
    if by == "geometry":
        return z - geometric_focus_um(scope, view=view)
    focus = measured_focus_um(scope, view=view)
    return None if focus is None else z - focus


def frame_in_focus(
    scope: Microscope, exposure: Exposure, defocus_um: float
) -> npt.NDArray[Any]:
    """What the camera would have given of the same field in focus and without noise.

    Parameters
    ----------
    scope : Microscope
        The microscope, its camera and lens as they were.
    exposure : Exposure
        One of ``scope.exposures``.
    defocus_um : float
        Of that frame, as :func:`defocus_um` tells it.

    Returns
    -------
    numpy.ndarray
        Of the shape and type of the frame.
    """
    z = exposure.z_um - exposure.parfocal_um - defocus_um
    light = scope.renderer.image(exposure.view, z)
    return scope.camera.expose(light, frame=None, **exposure.camera)
