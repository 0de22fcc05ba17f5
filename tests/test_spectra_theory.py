"""Spectra by theory teach what the spectra of images then ask for."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mm_autofocus.errors import InputError  # noqa: E402
from mm_autofocus.models.nets import build_net  # noqa: E402
from mm_autofocus.models.nets.base import NetContext  # noqa: E402
from mm_autofocus.models.nets.physics import CrossSpectra  # noqa: E402
from mm_autofocus.optics import (  # noqa: E402
    AbbeImager,
    Aberrations,
    Lens,
    condenser,
    transmission,
    wavefront_um,
)
from mm_autofocus.training.options import TheoryOptions, read_options  # noqa: E402
from mm_autofocus.training.spectra_first import spectra_first  # noqa: E402
from mm_autofocus.training.spectra_theory import SpectraByTheory, check_optics  # noqa: E402

torch.set_num_threads(1)

NA, PIXEL, PATCH = 0.6, 0.4, 96
LENS = {
    "sigma": (0.45, 0.7),
    "spherical_waves": (0.0, 0.06),
    "astigmatism_waves": (0.0, 0.0),
    "thickness_um": (0.5, 1.0),
}


def context(looks=(0.0, 4.0), channels=1, **known) -> NetContext:
    optics = {"na": NA, "pixel_size_um": PIXEL, "wavelength_um": 0.55, **known}
    return NetContext(
        looks_um=looks, channels=channels, range_um=(-12, 12), patch_px=PATCH, **optics
    )


def images(rng: np.random.Generator, defocus_um: float, looks=(0.0, 4.0)) -> np.ndarray:
    """What a camera sees of a weak specimen, ``(L, P, P)`` in 0 … 1, by the Abbe model."""
    edge = 160
    f = np.hypot(*np.meshgrid(*[np.fft.fftfreq(edge, PIXEL)] * 2))
    colour = (f + 0.02) ** -rng.uniform(1.0, 1.8)
    white = np.fft.fft2(rng.standard_normal((edge, edge)))
    texture = np.fft.ifft2(white * colour).real
    absorbance = 0.35 + 0.12 * (texture - texture.mean()) / texture.std()
    layer = transmission(
        np.clip(absorbance, 0, None), rng.uniform(0.03, 0.06) * absorbance, 0.55
    )
    lens = Lens(NA, aberrations=Aberrations(spherical_waves=rng.uniform(0.0, 0.06)))
    imager = AbbeImager(
        [layer],
        [0.0],
        pitch_um=PIXEL,
        wavelength_um=0.55,
        lens=lens,
        source=condenser(rng.uniform(0.45, 0.7), 24),
    )
    seen = np.stack([imager.image(defocus_um + look)[:PATCH, :PATCH] for look in looks])
    return 0.8 * seen + 0.008 * rng.standard_normal(seen.shape)


def test_a_net_taught_by_theory_alone_finds_the_defocus_of_images() -> None:
    theory = {"patches": 12_000, "passes": 5, "each": 8, **LENS}
    options = read_options({"looks_um": [0, 4], "net": {"spectra": 96}, "theory": theory})
    net = build_net("sparsefocus", context(), {**options.net, "widths": (8,), "depths": (1,)})
    said: list[str] = []
    spectra_first(net.eval(), None, options, torch.device("cpu"), said.append)
    assert said[0] == "spectra by theory, 0 of 12288"
    net.eval()
    rng = np.random.default_rng(5)
    label = np.linspace(-10, 10, 60)
    patches = np.stack([images(rng, d) for d in label]).astype(np.float32)
    with torch.inference_mode():
        looked = torch.from_numpy(patches)
        spectra = CrossSpectra(2, 1, PATCH)(looked)
        found = net.by_seen(torch.cat((spectra, looked.mean((2, 3))), 1)).defocus.numpy()
    error = np.abs(found - label)
    # the middle between the looks is 2 µm below; to guess it would be 5 µm off
    assert np.median(error) < 1.2
    assert np.mean(np.sign(found + 2) == np.sign(label + 2)) > 0.9


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("looks", [(0.0,), (-2.0, 0.0, 2.0)])
def test_it_draws_what_the_net_computes_of_patches(looks, channels) -> None:
    spectra = CrossSpectra(len(looks), channels, PATCH)
    ranges = TheoryOptions(patches=500, heights=1, each=2)
    theory = SpectraByTheory(context(looks, channels), ranges, 3, (0.5, 1.0))
    assert len(theory) == 8
    seen, defocus = theory[2]
    assert seen.shape == (64, spectra.features + len(looks) * channels)
    assert defocus.shape == (64,)
    assert seen.isfinite().all()
    assert (defocus.abs() <= 12).all()
    assert 0.3 < (defocus.abs() <= 1).float().mean() < 0.8
    again, other = theory[2], theory[3]
    torch.testing.assert_close(again[0], seen, rtol=0, atol=0)
    assert not torch.equal(other[0], seen)
    with pytest.raises(IndexError):
        theory[8]


def test_a_range_beside_focus_has_nothing_near_it() -> None:
    far = context().model_copy(update={"range_um": (5.0, 10.0)})
    _, defocus = SpectraByTheory(far, TheoryOptions(patches=200), 0, (0.5, 2.0))[0]
    assert ((defocus >= 5) & (defocus <= 10)).all()


def test_its_pupil_is_that_of_the_optics() -> None:
    theory = SpectraByTheory(context(), TheoryOptions(patches=1, heights=1, each=1), 1)
    theory[0]  # it draws from the dice of a draw
    lens = theory._lens(1)
    given = {key: float(value) for key, value in lens.items()}
    errors = Aberrations(
        spherical_waves=given["spherical"],
        astigmatism_waves=given["astigmatism"],
        astigmatism_deg=np.degrees(given["turned"]),
    )
    y, x = np.meshgrid(*[np.linspace(-0.65, 0.65, 9)] * 2, indexing="ij")
    at = [torch.tensor(v, dtype=torch.float32)[None, None] for v in (x, y)]
    _, phase, inside = theory._pupil(*at, lens, 0.46)
    error = wavefront_um(Lens(NA, aberrations=errors), np.hypot(x, y), np.arctan2(y, x))
    assert inside.all()
    np.testing.assert_allclose(phase[0, 0], 2 * np.pi / 0.46 * error, atol=1e-5)


def test_photographs_have_colours_of_their_own() -> None:
    theory = SpectraByTheory(context((0.0,), 3), TheoryOptions(patches=1), 1)
    theory[0]  # it draws from the dice of a draw
    slide = theory._specimen(600)
    made = theory._photographed(slide)
    photo = made["rms"][:, 3] > 0
    assert 0.2 < photo.float().mean() < 0.4
    for key in ("absorbance", "path", "rms", "alike"):
        torch.testing.assert_close(made[key][~photo, :3], slide[key][~photo])
    assert (made["blur"][~photo] == 0).all()
    assert made["blur"][photo].mean() > 0.05
    assert (made["alike"][photo] == 1).all()
    assert made["chroma"][~photo].max() == made["apart"][~photo].max() == 0
    assert made["chroma"][photo].max() > 0.4
    assert made["apart"][photo].max() > 0.5


def test_a_photographer_blurs_each_colour_moves_it_and_makes_fine_colours_grey() -> None:
    theory = SpectraByTheory(context((0.0,), 3), TheoryOptions(patches=1), 1)
    theory[0]  # it draws from the dice of a draw
    lens, slide = theory._lens(20), theory._specimen(20)
    f = np.array([0.1, 0.5, 1.0])

    def seen(**photo: torch.Tensor) -> torch.Tensor:
        theory._rng = np.random.default_rng(3)
        of = slide | {k: v.expand(20, *v.shape) for k, v in photo.items()}
        return theory._by_texture(lens, of, torch.zeros(20, 1), (0.0,), f, 3)

    sharp, wave = seen(), torch.tensor(f)[:, None, None]
    blur = torch.tensor([0.2, 0.0, 0.1])
    passed = torch.exp(-2 * np.pi**2 * blur.square() * wave[:, 0].square())
    both = (passed[:, :, None] * passed[:, None, :])[None, :, None].float()
    torch.testing.assert_close(seen(blur=blur), sharp * both, rtol=1e-4, atol=1e-7)

    # a shift turns the phase of a wave by its length along it; of all directions the mean
    places = torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.0, -0.2]])
    apart = (places[:, None] - places[None]).norm(dim=2)
    angle = torch.arange(720) * np.pi / 360
    turned = torch.cos(2 * np.pi * (wave * apart)[..., None] * torch.cos(angle)).mean(-1)
    factor = turned[None, :, None].float()
    torch.testing.assert_close(seen(apart=apart), sharp * factor, rtol=1e-4, atol=1e-6)

    # colours all alike where they are fine, and as they were where they are coarse
    grey = slide["absorbance"].mean(2, keepdim=True).expand(-1, -1, 3)
    chroma = seen(chroma=torch.tensor([2.0]))
    slide["absorbance"] = grey
    torch.testing.assert_close(chroma[:, 1:], seen()[:, 1:], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(chroma[:, 0], seen()[:, 0], rtol=1e-2)


def test_a_net_that_learned_before_keeps_what_it_finds_usual() -> None:
    theory = {"patches": 512, "passes": 1, **LENS}
    options = read_options({"looks_um": [0, 4], "net": {"spectra": 16}, "theory": theory})
    net = build_net("sparsefocus", context(), {**options.net, "widths": (8,), "depths": (1,)})
    assert not net.knows_usual
    spectra_first(net, None, options, torch.device("cpu"), lambda _: None)
    assert net.knows_usual
    before = net.state_dict()["dpn.spectral.usual.running_mean"].clone()
    other = options.model_copy(update={"seed": 1})
    spectra_first(net, None, other, torch.device("cpu"), lambda _: None)
    after = net.state_dict()["dpn.spectral.usual.running_mean"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("missing", ["na", "pixel_size_um"])
def test_theory_without_optics_is_refused(missing) -> None:
    with pytest.raises(InputError, match=f"theory.patches: needs {missing}"):
        check_optics(context(**{missing: None}))


def test_theory_of_dry_lenses_refuses_others() -> None:
    with pytest.raises(InputError, match=r"na 1\.4 is that of an immersion lens"):
        check_optics(context(na=1.4))


@pytest.mark.parametrize(
    ("theory", "sentence"),
    [
        ({"sigma": [0.9, 0.3]}, "theory.sigma"),
        ({"sigma": [0.0, 0.5]}, "theory.sigma"),
        ({"axial_colour_um": [1, -1]}, "theory.axial_colour_um"),
        ({"axial_colour_um": [0, float("inf")]}, "theory.axial_colour_um"),
        ({"thickness_um": [float("nan"), 3]}, "theory.thickness_um"),
        ({"lens": 3}, "theory"),
    ],
)
def test_bad_ranges_are_refused(theory, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        read_options({"theory": theory})
