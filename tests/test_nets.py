"""The nets: shapes, gradients, what they see, what they answer, and that each exports."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mm_autofocus.errors import InputError  # noqa: E402
from mm_autofocus.models.nets import NETS, build_net  # noqa: E402
from mm_autofocus.models.nets.base import NetContext, Output, Standardise  # noqa: E402
from mm_autofocus.models.nets.heads import BinsHead, GaussianHead, make_head  # noqa: E402
from mm_autofocus.models.nets.physics import (  # noqa: E402
    CrossSpectra,
    OtfMatch,
    RadialSpectrum,
    Rings,
    defocus_otf,
)
from mm_autofocus.models.nets.sparsefocus import SparseFocus, SparseFocusOptions  # noqa: E402

torch.set_num_threads(1)

SMALL = {
    "sparsefocus": {
        "widths": (8, 16),
        "depths": (1, 1),
        "rin_widths": (4, 4, 8),
        "spectra": 32,
    },
    "pg-dcn": {"widths": (8, 16), "depths": (1, 1)},
    "resnet": {"width": 8},
    "convnext": {"widths": (8, 16), "depths": (1, 1)},
}


def small(name: str, *, looks=(0.0,), channels=1, span=(-10.0, 10.0), **options):
    torch.manual_seed(0)
    context = NetContext(
        looks_um=looks,
        channels=channels,
        range_um=span,
        patch_px=128,
        na=0.5,
        wavelength_um=0.55,
        pixel_size_um=0.3,
    )
    return build_net(name, context, {**SMALL[name], **options})


def test_all_nets_are_tried_here() -> None:
    other = {"tsva", "unet", "nafnet"}  # tests/test_refocus_nets.py
    assert set(SMALL) | other == set(NETS.names())


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize(("looks", "channels"), [((0.0,), 3), ((0.0, 4.0), 1)])
def test_a_net_answers_and_learns(name, looks, channels) -> None:
    net = small(name, looks=looks, channels=channels)
    defocus = torch.tensor([-5.0, 0.0, 3.0, 8.0])
    for px in (128, 160):
        output = net(torch.rand(4, len(looks) * channels, px, px))
        assert output.defocus.shape == output.log_sd.shape == (4,)
        assert torch.isfinite(output.log_sd).all()
    losses = net.losses(output, defocus)
    assert all(math.isfinite(v.item()) for v in losses.values())
    sum(losses.values()).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None and not n.startswith("rin.")]
    assert idle == []  # processes that train together wait for all gradients


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_net_can_fit_a_handful_of_patches(name) -> None:
    larger = {"pg-dcn": {"physics": False}, "sparsefocus": {"spectra": 0}}  # they need these
    net = small(name, standardise="concat", **larger.get(name, {}))
    x = torch.rand(6, 1, 64, 64)
    defocus = torch.linspace(-8, 8, 6)
    for k in range(6):  # something to see
        x[k] *= 0.15 * (k + 1)
    optimiser = torch.optim.Adam(net.parameters(), 4e-3)
    for _ in range(60):
        loss = sum(net.losses(net(x), defocus).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.train()
    assert (net(x).defocus - defocus).abs().mean() < 1.5  # of 16 µm; at first about 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparsefocus", {"width": [8]}, r"net.width: is unknown \(did you mean 'widths'"),
        ("sparsefocus", {"pool": "sum"}, "net.pool: 'sum' is not allowed"),
        ("resnet", {"depth": 50}, "net.depth: 50 is not allowed"),
        ("pg-dcn", {"head": "bins"}, "net.head: 'bins' is not allowed"),
        ("sparsfocus", {}, r"model: 'sparsfocus' is unknown \(did you mean 'sparsefocus'"),
    ],
)
def test_a_bad_name_or_option_is_named(name, options, message) -> None:
    with pytest.raises(InputError, match=message):
        build_net(name, NetContext(), options)


def test_the_names_of_nets_need_no_torch() -> None:
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'lightning_fabric', 'onnx'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "import mm_autofocus.training.dataset, mm_autofocus.training.train\n"
        "import mm_autofocus.training.samples, mm_autofocus.training.export\n"
        "from mm_autofocus.models.nets import NETS, need_torch\n"
        "print(NETS.names())\n"
        "try: need_torch()\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "'sparsefocus'" in out
    assert "InputError" in out
    assert "pip install mm-autofocus[train]" in out


# ------------------------------------------------------------------------------- parts


def test_standardised_values_do_not_know_brightness_but_the_looks_contrast() -> None:
    x = torch.rand(2, 2, 16, 16)
    x[:, 1] = 0.5 + 0.1 * (x[:, 1] - 0.5)
    only = Standardise("only", 2)
    torch.testing.assert_close(only(x), only(0.5 * x + 0.2), atol=0.02, rtol=0.02)
    y = only(x)
    assert y[:, 1].std() < 0.2 * y[:, 0].std()
    both = Standardise("concat", 2)
    assert both(x).shape[1] == both.out_channels == 5
    torch.testing.assert_close(both(x)[:, :2], x)
    torch.testing.assert_close(both(x)[:, 2:4], y)
    # the last plane says how much contrast there was
    half = both(0.5 * x + 0.2)[:, 4] - both(x)[:, 4]
    torch.testing.assert_close(half, torch.full_like(half, math.log(0.5)), atol=0.02, rtol=0)
    flat = torch.full((1, 2, 16, 16), 0.3)
    assert torch.isfinite(only(flat)).all()


def bins(readout="mode", span=(-10.0, 10.0)) -> BinsHead:
    options = small("sparsefocus", readout=readout).options
    head = make_head(4, NetContext(range_um=span), options)
    assert isinstance(head, BinsHead)
    return head


@pytest.mark.parametrize("readout", ["mode", "mean"])
@pytest.mark.parametrize("at", [-10.0, -3.3, 0.0, 7.2, 10.0])
def test_the_best_distribution_reads_out_as_its_label(readout, at) -> None:
    head = bins(readout)
    head.linear = torch.nn.Identity()
    off = (head.centres - at) / (head.step * 0.75)
    output = head((-0.5 * off**2)[None])
    assert abs(float(output.defocus) - at) < 0.02
    assert 0.2 < float(output.log_sd.exp()) < 0.6


def test_of_two_peaks_the_higher_is_the_answer_and_the_sd_knows_of_both() -> None:
    head = bins()
    head.linear = torch.nn.Identity()
    p = torch.exp(-0.5 * ((head.centres - 6) / 0.4) ** 2)
    p = p + 0.6 * torch.exp(-0.5 * ((head.centres + 6) / 0.4) ** 2)
    output = head((p + 1e-9).log()[None])
    assert abs(float(output.defocus) - 6) < 0.05
    assert float(output.log_sd.exp()) > 5
    head.readout = "mean"
    assert abs(float(head((p + 1e-9).log()[None]).defocus)) < 2


def test_the_labels_at_the_ends_of_the_range_have_bins() -> None:
    head = bins(span=(-3.0, 12.0))
    assert float(head.centres[0]) <= -3.5
    assert float(head.centres[-1]) >= 12.5


def test_the_uncertainty_learns_the_error_without_moving_the_mean() -> None:
    head = GaussianHead(1, NetContext(range_um=(-10, 10)))
    mean = torch.zeros(64, requires_grad=True)
    log_sd = torch.zeros(64, requires_grad=True)
    label = torch.full((64,), 2.0)
    loss = head.losses(Output(mean, log_sd, {}), label)["uncertainty"]
    loss.backward()
    assert mean.grad is None or not mean.grad.any()
    assert (log_sd.grad < 0).all()  # it is off by more than it says


@pytest.mark.parametrize("rows", [1, 4])
def test_the_rin_takes_any_mosaic_of_whole_cells(rows) -> None:
    net = small("sparsefocus", channels=3)
    assert net.rin(torch.rand(2, 3, rows * 56, 3 * 56)).shape == (2, rows, 3)


def test_the_direction_selects_the_side() -> None:
    net = small("pg-dcn").eval()
    with torch.no_grad():
        output = net(torch.rand(8, 1, 128, 128))
    extra = output.extra
    expected = torch.where(extra["direction"] > 0, extra["above"], -extra["below"])
    torch.testing.assert_close(output.defocus, expected)
    assert (extra["above"] > 0).all()
    assert (extra["below"] > 0).all()


# ----------------------------------------------------------------------------- physics


def test_the_otf_of_a_lens() -> None:
    f = np.linspace(0, 2 * 0.5 / 0.55, 50)
    otf = defocus_otf(f, np.array([0.0, 2.0, -2.0, 8.0]), 0.5, 0.55)
    np.testing.assert_allclose(otf[:, 0], 1)  # light is not lost
    np.testing.assert_allclose(otf[:, -1], 0, atol=1e-6)  # nothing passes the cutoff
    assert (np.diff(otf[0]) < 0).all()
    # half the cutoff, in focus: 2/π (arccos ½ - ½ √¾)
    half = 2 / np.pi * (np.arccos(0.5) - 0.5 * np.sqrt(0.75))
    assert np.interp(0.5 / 0.55, f, otf[0]) == pytest.approx(half, abs=2e-3)
    np.testing.assert_allclose(otf[1], otf[2])  # even in defocus
    assert (otf[1, 1:25] < otf[0, 1:25]).all()
    assert otf[3, 5] < otf[1, 5]


def test_the_spectrum_has_its_peak_where_the_wave_is() -> None:
    spectrum = RadialSpectrum()
    x = torch.arange(128, dtype=torch.float32)
    for periods in (4, 9):
        wave = torch.sin(2 * math.pi * periods / 32 * x).expand(128, 128)
        for image in (wave, wave.t()):
            rings = spectrum(image[None, None].contiguous())[0, 0]
            assert spectrum.frequency[int(rings.argmax())] == periods / 32
    a = torch.rand(1, 1, 64, 64)
    by_numpy = 0.0
    window = spectrum.rings.window.numpy()
    for y in (0, 32):
        for z in (0, 32):
            tile = a[0, 0, y : y + 32, z : z + 32].numpy()
            by_numpy = by_numpy + np.abs(np.fft.rfft2((tile - tile.mean()) * window)) ** 2 / 4
    masks = spectrum.rings.masks.numpy()
    np.testing.assert_allclose(
        spectrum(a)[0, 0].exp().numpy(), masks @ by_numpy.T.ravel() + 1e-6, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("looks", "channels", "pairs"), [(1, 1, 0), (1, 3, 3), (2, 1, 1), (2, 3, 9)]
)
def test_spectra_of_planes_and_between_them(looks, channels, pairs) -> None:
    px, planes = 64, looks * channels
    spectra = CrossSpectra(looks, channels, px)
    rings = 7  # of a tile of 16 pixels
    assert spectra.features == 3 * rings * (planes + pairs)
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(0.05 * rng.standard_normal((64, planes, px, px), np.float32))
    found = spectra(noise).reshape(64, 3, planes + pairs, rings)
    for plane in range(1, planes):  # each but the first stands as a difference
        found[:, :, plane] += found[:, :, plane - (1 if plane < channels else channels)]
    found = found.exp().numpy()
    # white noise: its variance at the finest scale, a 4th and a 16th where 4, 16 are averaged;
    # a little more, for tiles that happen to hold more count for more
    power = found[:, :, :planes].mean((0, 2, 3))
    expected = 0.05**2 / np.array([1, 4, 16])
    assert (power > 0.95 * expected).all()
    assert (power < 1.2 * expected).all()
    apart = np.log(found[:, :, planes:])
    if pairs:
        assert abs(apart.mean()) < 0.02  # independent planes
        alike = noise[:, :1].expand(-1, planes, -1, -1) * torch.linspace(-1, 1, planes)[
            :, None, None
        ].sub(0.1)
        same = spectra(alike).reshape(64, 3, planes + pairs, rings)[:, :, planes:].tanh()
        signs = np.sign([(a - 0.1) * (b - 0.1) for a, b in _pairs(spectra, planes)])
        np.testing.assert_allclose(same.mean((0, 1, 3)).numpy(), signs, atol=0.02)


def test_an_almost_empty_patch_is_read_where_its_specimen_is() -> None:
    px, rng = 64, np.random.default_rng(0)
    spectra = CrossSpectra(1, 1, px)
    grain = torch.from_numpy(0.01 * rng.standard_normal((32, 1, px, px), np.float32))
    specimen = torch.zeros(1, 1, px, px)
    specimen[..., 16:32, 32:48] = torch.from_numpy(rng.standard_normal((16, 16), np.float32))
    finest = spectra(0.1 * specimen + grain)[:, :7]  # its rings
    real, imaginary = spectra.rings.transform(0.1 * specimen[..., 16:32, 32:48])
    own = spectra.rings.means(real.square() + imaginary.square())[:, 0].log()
    # 15 of 16 tiles are empty: a plain mean would be 2.8 below
    assert (finest - own).abs().max() < 1


def test_the_transform_of_a_graph_is_the_fast_one() -> None:
    for size in (16, 25):
        rings = Rings(size)
        tiles = torch.rand(2, 3, 4, size, size)
        both = torch.fft.rfft2(tiles).transpose(3, 4)
        real, imaginary = rings.by_matrices(tiles)
        torch.testing.assert_close(real, both.real, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(imaginary, both.imag, rtol=1e-4, atol=1e-4)


def _pairs(spectra: CrossSpectra, planes: int) -> list[tuple[float, float]]:
    at = np.linspace(-1, 1, planes)
    return [(at[a], at[b]) for a, b in zip(spectra.first, spectra.second, strict=True)]


def test_spectra_need_whole_patches() -> None:
    net = SparseFocus(NetContext(patch_px=64), SparseFocusOptions(spectra=16))
    with pytest.raises(InputError, match=r"train_px: 48 is less than patch_px, 64"):
        net(torch.zeros(2, 1, 48, 48))
    published = SparseFocus(NetContext(patch_px=64), SparseFocusOptions())
    assert published(torch.zeros(2, 1, 48, 48)).defocus.shape == (2,)


@pytest.mark.parametrize("looks", [(0.0,), (0.0, 4.0)])
def test_the_theory_alone_finds_the_defocus_of_a_blurred_texture(looks) -> None:
    # nothing is trained: white noise has the flat spectrum that the match begins with
    context = NetContext(
        looks_um=looks,
        range_um=(-10, 10),
        patch_px=128,
        na=0.5,
        wavelength_um=0.55,
        pixel_size_um=0.3,
    )
    match = OtfMatch(context)
    rng = np.random.default_rng(0)
    fy, fx = np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256), indexing="ij")
    f = np.hypot(fx, fy).ravel() / 0.3
    errors, signs = [], []
    for d in (-8.0, -4.0, -1.0, 2.0, 6.0):
        texture = np.fft.fft2(rng.normal(size=(256, 256)))
        patches = []
        for offset in looks:
            otf = defocus_otf(f, np.array([d + offset]), 0.5, 0.55).reshape(256, 256)
            image = np.fft.ifft2(texture * otf).real + 1e-3 * rng.normal(size=(256, 256))
            patches.append(0.5 + 0.1 * image)
        with torch.no_grad():
            x = torch.tensor(np.stack(patches)[None], dtype=torch.float32)
            _, logits = match(x)
        answer = float(match.hypotheses[int(logits.argmax())])
        errors.append(abs(abs(answer) - abs(d)))
        signs.append(answer * d > 0)
    assert np.mean(errors) < 1.1  # hypotheses are 1 µm apart
    assert len(looks) == 1 or all(signs)


def test_the_importance_of_a_patch_does_not_depend_on_its_neighbours() -> None:
    net = build_net("sparsefocus", NetContext(channels=3)).eval()
    assert net.rin is not None
    mosaic = torch.rand(1, 3, 3 * 56, 4 * 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = net.rin(mosaic)
        alone = [
            net.rin(mosaic[..., 56 * i : 56 * i + 56, 56 * j : 56 * j + 56])[0, 0, 0]
            for i in range(3)
            for j in range(4)
        ]
    assert whole.shape == (1, 3, 4)
    assert torch.allclose(whole.flatten(), torch.stack(alone), atol=1e-5)
    assert float(whole.std()) > 0
