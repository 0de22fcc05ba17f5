"""Image formation against derivations that do not use it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mm_autofocus.errors import InputError
from mm_autofocus.optics import (
    AbbeImager,
    Aberrations,
    FluorescenceImager,
    Lens,
    condenser,
    good_size,
    transmission,
)

N = 128
PITCH = 0.2
WAVELENGTH = 0.55


def axial_intensity(lens, d, wavelength=WAVELENGTH, wave=lambda rho: 0 * rho):
    """|∫ P·exp(i·kz·d) f df / ∫ f df|² by the midpoint rule, apart from the code."""
    rho = (np.arange(20000) + 0.5) / 20000
    sin = lens.na * rho / lens.index
    k = 2 * math.pi * lens.index / wavelength
    phase = k * (np.sqrt(1 - sin**2) - 1) * d + 2 * math.pi * wave(rho)
    return abs(np.sum(np.exp(1j * phase) * rho) / np.sum(rho)) ** 2


def thin(t, lens, n_points=24, sigma=0.6, *, pitch=PITCH, wavelength=WAVELENGTH, smooth=False):
    return AbbeImager(
        [t.astype(np.complex64)],
        [0.0],
        pitch_um=pitch,
        wavelength_um=wavelength,
        lens=lens,
        source=condenser(sigma, n_points),
        smooth=smooth,
    )


def blob(n=N, pitch=PITCH, radius=1.2):
    x = (np.arange(n) - n // 2) * pitch
    return np.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / (2 * radius**2))


def speckle(n=N, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    f = np.fft.fftfreq(n)
    spectrum = np.fft.fft2(rng.normal(size=(n, n)))
    a = np.fft.ifft2(spectrum * np.exp(-((f[:, None] ** 2 + f**2) * (scale * 6) ** 2))).real
    return 0.4 * (a - a.min()) / np.ptp(a)


# --- resolution ---


def grating_contrast(frequency_bins, sigma, n_points, lens, *, n=240, pitch=0.1):
    """Contrast of a weak sinusoidal absorption grating in focus, and its frequency."""
    x = np.arange(n) / n
    a = 0.02 * np.cos(2 * math.pi * frequency_bins * x)
    t = np.exp(-0.5 * np.broadcast_to(a, (n, n)))
    image = thin(t, lens, n_points, sigma, pitch=pitch).image(0.0)
    line = image[n // 2]
    got = 2 * abs(np.fft.fft(line)[frequency_bins]) / n / line.mean()
    return got / 0.02, frequency_bins / (n * pitch)


@pytest.mark.parametrize("na", [0.3, 0.75, 0.95])
def test_coherent_resolution_ends_at_na_over_lambda(na):
    lens = Lens(na)
    limit = na / WAVELENGTH * 24  # in bins of 1/24 cycles per µm
    assert grating_contrast(math.floor(limit), 0.5, 1, lens)[0] == pytest.approx(1, abs=1e-3)
    assert grating_contrast(math.ceil(limit), 0.5, 1, lens)[0] < 1e-3


def test_partially_coherent_resolution_ends_at_one_plus_sigma():
    lens, sigma = Lens(0.5), 0.8
    cut = lens.na / WAVELENGTH
    below, f1 = grating_contrast(math.floor(cut * (1 + sigma) * 24 * 0.9), sigma, 112, lens)
    above, f2 = grating_contrast(math.ceil(cut * (1 + sigma) * 24 * 1.02), sigma, 112, lens)
    assert f1 < cut * (1 + sigma) < f2
    assert below > 0.02
    assert above < 1e-3


def test_incoherent_transfer_is_the_diffraction_limited_otf_up_to_lambda_over_2na():
    lens = Lens(0.4)
    n, pitch = 200, 0.15
    imager = FluorescenceImager(
        [np.ones((n, n), np.float32)], [0.0], pitch_um=pitch, wavelength_um=0.6, lens=lens
    )
    otf = imager.otf(0.0)[0].real
    f = np.arange(n // 2 + 1) / (n * pitch)
    x = np.minimum(f / (2 * lens.na / 0.6), 1)
    expected = 2 / math.pi * (np.arccos(x) - x * np.sqrt(1 - x * x))  # Goodman, eq. 6-31
    assert np.abs(otf - expected).max() < 0.015
    # The disc of a sampled pupil is exact to one sample at its edge.
    assert np.abs(otf[f > 2 * lens.na / 0.6 + 2 / (n * pitch)]).max() < 1e-5


# --- the ideal pupil along the axis ---


def test_paraxial_axial_intensity_is_born_and_wolf_sinc_squared():
    lens, lam, n = Lens(0.1), 0.5, 400
    point = np.zeros((n, n), np.float32)
    point[0, 0] = 1
    imager = FluorescenceImager([point], [0.0], pitch_um=1.0, wavelength_um=lam, lens=lens)
    focus = imager.image(0.0)[0, 0]
    for d in (10.0, 30.0, 50.0, 75.0, 100.0, -50.0):
        u = 2 * math.pi * lens.na**2 * d / lam
        expected = np.sinc(u / 4 / math.pi) ** 2
        assert imager.image(d)[0, 0] / focus == pytest.approx(expected, abs=0.01)
    assert imager.image(100.0)[0, 0] / focus < 1e-3  # the first zero, 2λn/NA²


@pytest.mark.parametrize(("na", "index"), [(0.75, 1.0), (0.95, 1.0), (1.3, 1.515)])
def test_axial_intensity_at_high_aperture_agrees_with_quadrature(na, index):
    lens = Lens(na, index)
    n, pitch = 512, 0.05  # fine, so that the point is the whole pupil's
    point = np.zeros((n, n), np.float32)
    point[0, 0] = 1
    imager = FluorescenceImager([point], [0.0], pitch_um=pitch, wavelength_um=0.55, lens=lens)
    focus = imager.image(0.0)[0, 0]
    for d in (0.25, 0.5, 1.0, -0.5, 2.0):
        got = imager.image(d)[0, 0] / focus
        assert got == pytest.approx(axial_intensity(lens, d), abs=0.01), d


def test_a_coherent_pinhole_has_the_same_axial_intensity():
    n, pitch = 512, 0.05
    t = np.zeros((n, n), np.complex64)
    t[0, 0] = 1
    imager = thin(t, Lens(0.75), 1, 0.5, pitch=pitch)
    focus = imager.image(0.0)[0, 0]
    for d in (0.5, 1.0, -1.5):
        got = imager.image(d)[0, 0] / focus
        assert got == pytest.approx(axial_intensity(Lens(0.75), d), abs=0.01)


# --- energy, symmetry, sign ---


def test_defocus_neither_makes_nor_loses_light():
    t = transmission(speckle(), 0.05 * speckle(seed=1), WAVELENGTH)
    imager = thin(t, Lens(0.75))
    light = [imager.image(d).mean() for d in (-20, -5, -1, 0, 1, 5, 20)]
    assert np.ptp(light) / light[0] < 1e-5
    fluo = FluorescenceImager(
        [speckle().astype(np.float32)],
        [0.0],
        pitch_um=PITCH,
        wavelength_um=0.5,
        lens=Lens(0.75),
    )
    total = [fluo.image(d).mean() for d in (-5, 0, 5)]
    assert np.ptp(total) / total[0] < 1e-5
    assert total[0] == pytest.approx(speckle().mean(), rel=1e-5)


def test_a_pure_phase_object_passes_all_light_through_a_pupil_that_takes_it_all():
    t = transmission(np.zeros((N, N)), 0.1 * blob(), WAVELENGTH)
    assert thin(t, Lens(0.95), 8, 0.3).image(3.0).mean() == pytest.approx(1, abs=1e-4)


def test_a_blank_field_is_one():
    image = thin(np.ones((N, N)), Lens(0.75), smooth=True).image(7.0)
    assert np.abs(image - 1).max() < 1e-5


@pytest.mark.parametrize("d", [0.7, 3.0, 12.0])
def test_a_pure_absorber_under_a_symmetric_source_is_even_in_z(d):
    imager = thin(transmission(speckle(), np.zeros((N, N)), WAVELENGTH), Lens(0.75))
    up, down = imager.image(d), imager.image(-d)
    assert np.abs(up - down).max() < 2e-5
    assert np.ptp(up) > 1e-3


def test_phase_and_each_sign_of_spherical_aberration_break_the_evenness():
    zero = np.zeros((N, N))
    phase = thin(transmission(speckle(), 0.05 * speckle(), WAVELENGTH), Lens(0.75))
    assert np.abs(phase.image(2) - phase.image(-2)).max() > 0.02
    images = {}
    for c in (-0.06, 0.06):
        lens = Lens(0.75, aberrations=Aberrations(spherical_waves=c))
        imager = thin(transmission(speckle(), zero, WAVELENGTH), lens)
        images[c] = imager.image(1.5)
        assert np.abs(imager.image(1.5) - imager.image(-1.5)).max() > 0.005
        images[-c, "below"] = imager.image(-1.5)
    # Conjugation: the other sign of the aberration is the other side of focus.
    assert np.abs(images[0.06] - images[0.06, "below"]).max() < 2e-5


def test_transport_of_intensity_gives_sign_and_size_for_a_weak_phase_object():
    opd = 0.004 * blob(radius=2.0)
    d = 0.2
    imager = thin(transmission(np.zeros((N, N)), opd, WAVELENGTH), Lens(0.75), 24, 0.3)
    got = (imager.image(d) - imager.image(-d)) / (2 * d)
    # ∂I/∂z = -∇·(I ∇w)/n with w the optical path; here n = 1 and I = 1, and the Laplacian
    # of a Gaussian of radius r is analytic.
    x = (np.arange(N) - N // 2) * PITCH
    r2 = x[:, None] ** 2 + x[None, :] ** 2
    expected = -opd * (r2 / 2.0**4 - 2 / 2.0**2)
    middle = N // 2
    assert got[middle, middle] > 0  # a thick spot is a lens: bright above focus
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


# --- aberrations ---


def best_focus(image_at, low, high, steps=61):
    """Where the intensity at the origin is largest, by a parabola through the top."""
    z = np.linspace(low, high, steps)
    v = np.array([image_at(d)[0, 0] for d in z])
    i = int(np.clip(v.argmax(), 1, steps - 2))
    a, b, c = v[i - 1 : i + 2]
    return z[i] + 0.5 * (a - c) / (a - 2 * b + c) * (z[1] - z[0])


def pinhole(lens, n=256, pitch=0.25, wavelength=WAVELENGTH):
    point = np.zeros((n, n), np.float32)
    point[0, 0] = 1
    return FluorescenceImager(
        [point], [0.0], pitch_um=pitch, wavelength_um=wavelength, lens=lens
    ).image


@pytest.mark.parametrize("waves", [0.25, -0.25, 0.5])
def test_best_focus_moves_by_the_known_amount_under_spherical_aberration(waves):
    # W = A·ρ⁴ = A·[Z(4,0)/(6√5) + Z(2,0)/(2√3) + 1/3]; the best plane balances it with
    # -A·ρ², which is d = 2·A·λ·n/NA² (Born & Wolf, § 9.2), at a small aperture.
    ab = Aberrations(
        spherical_waves=waves / (6 * math.sqrt(5)), defocus_waves=waves / (2 * math.sqrt(3))
    )
    lens = Lens(0.3, aberrations=ab)
    expected = 2 * waves * 0.55 / 0.3**2
    got = best_focus(pinhole(lens), expected - 4, expected + 4)
    assert got == pytest.approx(expected, abs=0.04 * abs(expected))


def test_balanced_spherical_aberration_leaves_the_best_plane_at_a_small_aperture():
    lens = Lens(0.3, aberrations=Aberrations(spherical_waves=0.07))
    assert abs(best_focus(pinhole(lens), -4, 4)) < 0.05


@pytest.mark.parametrize("waves", [0.05, 0.07, -0.07])
def test_strehl_is_marechals(waves):
    for name in ("spherical", "astigmatism", "coma"):
        lens = Lens(0.3, aberrations=Aberrations(**{f"{name}_waves": waves}))
        ideal = pinhole(Lens(0.3))(0.0).max()
        strehl = pinhole(lens)(0.0)[0, 0] / ideal
        assert strehl == pytest.approx(math.exp(-((2 * math.pi * waves) ** 2)), abs=0.012)


def test_axial_colour_turns_the_order_of_the_channels_across_focus():
    lens = Lens(0.75, aberrations=Aberrations(axial_colour_um=0.6))
    best = {
        lam: best_focus(pinhole(lens, pitch=0.15, wavelength=lam), -1, 1)
        for lam in (0.46, 0.55, 0.62)
    }
    assert best[0.46] < best[0.55] < best[0.62]
    assert best[0.62] - best[0.46] == pytest.approx(0.6 * 0.16 / 0.2, abs=0.01)
    contrast = {}
    for lam in (0.46, 0.62):
        imager = thin(
            transmission(speckle(scale=0.5), np.zeros((N, N)), lam), lens, wavelength=lam
        )
        contrast[lam] = [imager.image(d).std() / imager.image(0).std() for d in (-2.0, 2.0)]
    assert contrast[0.46][0] > contrast[0.62][0]  # below focus blue is the sharper one
    assert contrast[0.46][1] < contrast[0.62][1]


def test_astigmatism_turns_with_its_angle_and_across_focus():
    def widths(angle, d):
        ab = Aberrations(astigmatism_waves=0.1, astigmatism_deg=angle)
        psf = np.fft.fftshift(pinhole(Lens(0.75, aberrations=ab), n=128, pitch=0.1)(d))
        middle = psf.shape[0] // 2
        return psf[middle - 8 : middle + 9, middle].sum(), psf[
            middle, middle - 8 : middle + 9
        ].sum()

    y, x = widths(0, 0.8)
    assert y / x != pytest.approx(1, abs=0.05)
    assert widths(0, -0.8) == pytest.approx((x, y), rel=1e-3)
    assert widths(90, 0.8) == pytest.approx((x, y), rel=1e-3)


# --- layers and the condenser ---


def test_two_layers_are_sharp_at_their_own_heights():
    lens, medium = Lens(0.3), 1.5
    clear = np.ones((N, N), np.complex64)
    grain = transmission(0.2 * speckle(scale=0.25), np.zeros((N, N)), WAVELENGTH)
    sharp = {}
    for name, layers in {"low": [grain, clear], "high": [clear, grain]}.items():
        imager = AbbeImager(
            layers,
            [0.0, 12.0],
            pitch_um=0.4,
            wavelength_um=WAVELENGTH,
            lens=lens,
            source=condenser(0.6, 24),
            medium_index=medium,
            smooth=False,
        )
        z = np.linspace(-12, 12, 49)
        s = [imager.image(d).std() for d in z]
        sharp[name] = z[int(np.argmax(s))]
    # A depth in glass is shorter by its index, seen from air.
    assert sharp["low"] == pytest.approx(-6 / medium, abs=0.6)
    assert sharp["high"] == pytest.approx(6 / medium, abs=0.6)


def test_splitting_a_thin_layer_changes_nothing():
    t = transmission(speckle(), 0.05 * speckle(), WAVELENGTH)
    half = np.sqrt(np.abs(t)) * np.exp(0.5j * np.angle(t))
    args = {
        "pitch_um": PITCH,
        "wavelength_um": WAVELENGTH,
        "lens": Lens(0.75),
        "source": condenser(0.6, 8),
    }
    one = AbbeImager([t], [0.0], **args)
    two = AbbeImager([half.astype(np.complex64)] * 2, [0.0, 1e-4], **args)
    assert np.abs(one.image(2.0) - two.image(2.0)).max() < 2e-3
    uncached = AbbeImager([half.astype(np.complex64)] * 2, [0.0, 1e-4], cache_mb=0, **args)
    assert np.array_equal(two.image(2.0), uncached.image(2.0))


def test_spreading_few_points_over_their_patches_is_nearer_to_many_points():
    t = transmission(2 * speckle(), np.zeros((N, N)), WAVELENGTH)
    many = thin(t, Lens(0.75), 112).image(10.0)
    bare = np.abs(thin(t, Lens(0.75), 8).image(10.0) - many).mean()
    smooth = np.abs(thin(t, Lens(0.75), 8, smooth=True).image(10.0) - many).mean()
    assert smooth < 0.5 * bare


@pytest.mark.parametrize("n", [4, 6, 8, 12, 16, 24, 40, 60, 112])
def test_the_condenser_is_even_and_its_second_moment_exact(n):
    points = condenser(0.7, n).points
    assert len(points) == n
    assert np.hypot(*points.T).max() < 0.7
    assert (points**2).sum(axis=1).mean() == pytest.approx(0.7**2 / 2)
    gap = np.abs(points[:, None] + points[None]).sum(-1).min(axis=1)
    assert gap.max() < 1e-9


@pytest.mark.parametrize("n", [1, 7, 100, 513, 577, 2017])
def test_good_size(n):
    m = good_size(n)
    assert m >= n
    assert m % 2 == 0
    for p in (2, 3, 5):
        while m % p == 0:
            m //= p
    assert m == 1


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Lens(-0.3), ["na", "-0.3", "0.01"]),
        (lambda: Lens(1.2), ["na", "1.2", "index 1"]),
        (lambda: Lens(float("nan")), ["na"]),
        (lambda: Lens(0.5, 3.0), ["index", "3"]),
        (lambda: Aberrations(spherical_waves=9), ["spherical_waves", "9", "2"]),
        (lambda: Aberrations(axial_colour_um=99), ["axial_colour_um", "99", "20"]),
        (lambda: condenser(1.5, 8), ["sigma", "1.5", "0.98"]),
        (lambda: condenser(0.5, 5), ["n_points", "5", "8"]),
        (
            lambda: thin(np.ones((8, 8)), Lens(0.5), wavelength=-0.5),
            ["wavelength_um", "-0.5", "0.2"],
        ),
        (lambda: thin(np.ones((8, 8)), Lens(0.5), pitch=0), ["pitch_um", "0"]),
        (lambda: thin(np.ones((9, 8)), Lens(0.5)), ["layers", "even"]),
    ],
)
def test_settings_outside_of_physics_are_named(make, words):
    with pytest.raises(InputError) as error:
        make()
    for word in words:
        assert word in str(error.value)
