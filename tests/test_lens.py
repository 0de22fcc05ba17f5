"""What a net is told of the lens: its code, what it learns by it, and how a lab finds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import useq
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mm_autofocus import cli
from mm_autofocus.config import close_core, open_core
from mm_autofocus.errors import InputError
from mm_autofocus.models.card import UNSEALED
from mm_autofocus.models.importing import load_model
from mm_autofocus.models.lens import LENS_NAMES, code_of, values_of
from mm_autofocus.models.runtime import OnnxModel
from mm_autofocus.settings_file import read_settings
from mm_autofocus.sim.draws import draw
from mm_autofocus.sim.truth import microscope_of
from mm_autofocus.training import Dataset
from mm_autofocus.training.collect import collect
from mm_autofocus.training.judges import ModelJudge, looks_at

torch = pytest.importorskip("torch")

from mm_autofocus.models.nets import build_net  # noqa: E402
from mm_autofocus.models.nets.base import NetContext  # noqa: E402
from mm_autofocus.training.curve_fit import fit_curve, write_curve  # noqa: E402
from mm_autofocus.training.fields import Field  # noqa: E402
from mm_autofocus.training.fitted_copy import onnx_model  # noqa: E402
from mm_autofocus.training.lens_fit import _Answer, fit_lens, lens_model  # noqa: E402
from mm_autofocus.training.options import TheoryOptions, merge_sets, read_options  # noqa: E402
from mm_autofocus.training.samples import PatchSource  # noqa: E402
from mm_autofocus.training.spectra_first import learn, spectra_first  # noqa: E402
from mm_autofocus.training.spectra_theory import SpectraByTheory  # noqa: E402
from mm_autofocus.training.train import prepare  # noqa: E402

import blurred  # noqa: E402
from blurred import OPTIONS, make_dataset  # noqa: E402

torch.set_num_threads(1)

RANGES = {"sigma": (0.3, 0.9), "axial_colour_um": (-1.0, 1.0)}
NET = {"widths": (8,), "depths": (1,), "spectra": 48}
MODEL = "sparsefocus-slide20x"
SEED = 3  # of a lens whose condenser is nearly as wide open as they are drawn


def context(**changes: Any) -> NetContext:
    known = {"na": 0.6, "pixel_size_um": 0.4, "wavelength_um": 0.55}
    return NetContext(
        **{"channels": 1, "range_um": (-12, 12), "patch_px": 96, **known, **changes}
    )


def code_of_command(*words: str) -> int:
    with pytest.raises(SystemExit) as e:
        cli.main(list(words))
    return int(e.value.code or 0)


@given(st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=2, max_size=2))
def test_a_code_says_what_it_was_made_of(values: list[float]) -> None:
    known = dict(zip(RANGES, values, strict=True))
    code = code_of(RANGES, known)
    assert code.dtype == np.float32
    assert values_of(RANGES, code) == pytest.approx(known, abs=1e-5)
    for name, (low, high) in RANGES.items():
        for end, number in ((low, -1), (high, 1)):
            at = code_of(RANGES, known | {name: end})[list(RANGES).index(name)]
            assert at == pytest.approx(number, abs=1e-6)


@pytest.mark.parametrize("known", [None, {}, {"sigma": 0.5}])
def test_what_is_not_known_altogether_is_not_known(known) -> None:
    code = code_of(RANGES, known)
    assert not code.any()
    assert values_of(RANGES, code) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lens": RANGES}, "net.lens: .* needs net.spectra"),
        ({"spectra": 8, "lens": {"sigma": (0.9, 0.3)}}, "the smaller end comes first"),
        ({"spectra": 8, "lens": {"sgima": (0.3, 0.9)}}, "'sigma'"),
    ],
)
def test_bad_options_are_refused(options, message) -> None:
    with pytest.raises(InputError, match=message):
        build_net("sparsefocus", context(), options)


def test_a_net_that_is_told_nothing_answers_as_of_an_unknown_lens() -> None:
    torch.manual_seed(0)
    net = build_net("sparsefocus", context(), {**NET, "lens": RANGES}).eval()
    patches = torch.rand(3, 1, 96, 96)
    unknown, known = torch.zeros(1, 3), torch.tensor([[0.5, -0.5, 1.0]])
    with torch.no_grad():
        plain = net(patches).defocus
        torch.testing.assert_close(net(patches, unknown).defocus, plain)
        # it has not learned anything of lenses yet
        torch.testing.assert_close(net(patches, known).defocus, plain)
        net.dpn.spectral.lens.outer.weight.normal_()
        told = net(patches, known).defocus
        assert (told - net(patches).defocus).abs().min() > 1e-3
        seen = net.seen(patches, known.expand(3, -1))
        torch.testing.assert_close(net.by_seen(seen).defocus, told, rtol=1e-4, atol=1e-4)


def test_theory_tells_the_lens_it_drew_and_draws_the_same() -> None:
    options = TheoryOptions(patches=64, sigma=(0.5, 0.5), axial_colour_um=(0.2, 0.2))
    told = SpectraByTheory(context(), options, 3, told=RANGES)[0][0]
    plain = SpectraByTheory(context(), options, 3)[0][0]
    torch.testing.assert_close(told[:, :-3], plain, rtol=0, atol=0)
    expected = code_of(RANGES, {"sigma": 0.5, "axial_colour_um": 0.2})
    np.testing.assert_allclose(told[:, -3:], np.tile(expected, (len(told), 1)), atol=1e-6)


def test_a_net_learns_what_a_lens_does() -> None:
    theory = {
        "patches": 16_000,
        "passes": 4,
        "sigma": RANGES["sigma"],
        "axial_colour_um": (0.3, 0.3),
        "spherical_waves": (0.05, 0.05),
        "astigmatism_waves": (0.0, 0.0),
        "thickness_um": (1.0, 1.0),
    }
    options = read_options({"theory": theory})
    given = {"lens": {"sigma": RANGES["sigma"]}}
    net = build_net("sparsefocus", context(), {**NET, **given}).eval()
    said: list[str] = []
    spectra_first(net, None, options, torch.device("cpu"), said.append)
    net.eval()
    drawn = SpectraByTheory(context(), options.theory, 99, told=net.lens)
    seen, label = (torch.cat(parts) for parts in zip(drawn[0], drawn[1], strict=True))
    with torch.inference_mode():
        told = (net.by_seen(seen).defocus.abs() - label.abs()).abs().mean()
        seen[:, -2:] = 0
        untold = (net.by_seen(seen).defocus.abs() - label.abs()).abs().mean()
    assert told < 0.85 * untold
    assert untold < 0.8 * (label.abs() - label.abs().mean()).abs().mean()


def test_nothing_is_dropped_where_millions_are_shown(monkeypatch) -> None:
    net = build_net("sparsefocus", context(), NET)
    dropped: list[bool] = []
    monkeypatch.setattr(
        torch.nn.Dropout, "forward", lambda self, x: dropped.append(self.training) or x
    )
    taught = torch.randn(64, net.dpn.spectral.usual.num_features), torch.zeros(64)
    for muon in (True, False):
        learn(net, taught, passes=1, seed=0, say=lambda _: None, muon=muon)
        assert set(dropped) == {not muon}
        dropped.clear()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Stacks of two fields under a lens, by a microscope that has no play."""
    folder = tmp_path_factory.mktemp("lens") / "stacks"
    core = open_core("virtual_slide.cfg")
    try:
        for play in ("backlash_um", "repeatability_um", "drift_um_h"):
            core.setProperty("Z", play, 0)
        core.setProperty("Camera", "sensor", "256x256")
        scope = microscope_of(core)
        drawn = draw(SEED)
        drawn.apply(scope)
        fields = scope.slide.find_fields("dense", 2, (256 * 0.325,) * 2)
        planes = sorted({*range(-26, 27, 2), *range(-5, 6)})
        plan = useq.MDASequence(
            stage_positions=[
                {"x": x, "y": y, "z": scope.slide.height_at(x, y) - 1, "name": f"f{k}"}
                for k, (x, y) in enumerate(fields)
            ],
            z_plan=useq.ZRelativePositions(relative=planes),
        )
        known = drawn.optics.lens
        lens = {name: known[name] for name in LENS_NAMES}
        with pytest.raises(InputError, match=r"lens: 'sgima' is unknown .did you mean 'sigma'"):
            collect(plan, core, folder, lens={"sgima": 0.5})
        assert not folder.exists()
        collect(
            plan,
            core,
            folder,
            optics={"na": 0.75, "magnification": 20},
            lens=lens,
            simulated=True,
        )
    finally:
        close_core(core)
    return Dataset.open(folder)


def test_what_is_known_of_the_lens_goes_with_the_patches(dataset: Dataset) -> None:
    stacks = dataset.labelled
    assert len(stacks) == 2
    optics = draw(SEED).optics
    assert stacks[0].lens["sigma"] == optics.sigma > 0.7
    planes = np.arange(len(stacks[0].z_um))[:, None]
    content = np.ones((16, 16), bool)
    of = Field(stacks[0], planes, stacks[0].defocus_um, content, np.argwhere(content))
    change = read_options({}).augment
    ranges = {"sigma": (0.45, 0.75)}
    sample = PatchSource([of], 224, 1, 0, change, told=ranges)[0]
    np.testing.assert_array_equal(sample["lens"], code_of(ranges, stacks[0].lens))
    assert "lens" not in PatchSource([of], 224, 1, 0, change)[0]


def test_the_second_half_of_a_graph_answers_as_the_whole(dataset: Dataset) -> None:
    model = lens_model(MODEL)
    patches = model.content_patches([dataset.labelled[0].plane(3)], 3, max_value=255)
    assert patches.shape == (3, 3, 224, 224)
    answer = _Answer(model)
    for code in (np.zeros(5, np.float32), np.array([0.9, 0, -0.5, 0.2, 1], np.float32)):
        model.net.lens = code
        np.testing.assert_allclose(
            answer(answer.see(patches), code), model.net.patches(patches), rtol=1e-4, atol=1e-3
        )
    model.net.lens = None
    plain = model.net.patches(patches)[0]
    assert np.abs(plain - answer(answer.see(patches), code)[0]).max() > 0.05


def test_a_lens_is_found_and_the_copy_knows_it(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, settings = tmp_path / "mine.onnx", tmp_path / "mine.yaml"
    words = ["calibrate", str(dataset.path), "--model", MODEL, "--fit-lens", str(copy)]
    assert code_of_command(*words, "-o", str(settings), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    lens = said["lens"]
    assert said["model"] == str(copy)
    assert lens["values"]["sigma"] == pytest.approx(draw(SEED).optics.sigma, abs=0.06)
    assert lens["mae_um"] < 0.8 * lens["mae_before_um"]
    inside = sum(int((np.abs(s.defocus_um) <= 26).sum()) for s in dataset.labelled)
    assert (lens["fields"], lens["frames"]) == (2, inside)
    wanted = read_settings(settings)
    assert (wanted["strategy"], wanted["model"]) == ("one-shot", str(copy))
    assert "on fields that its lens was not found by" in settings.read_text()
    model = load_model(copy)
    assert isinstance(model, OnnxModel)
    assert model.card.lens is not None
    assert model.card.lens.values["sigma"] == pytest.approx(lens["values"]["sigma"], abs=1e-3)
    assert model.card.error != load_model(MODEL).card.error
    assert (model.card.name, model.card.lens.fitted["model"]) == ("mine", MODEL)
    # without being told again
    off = {}
    for name, judged in (("before", load_model(MODEL)), ("after", model)):
        judge, stack = ModelJudge(judged), dataset.labelled[0]
        planes = range(1, len(stack.z_um) - 1, 2)
        answers = [judge([stack.plane(k)], stack).defocus_um for k in planes]
        off[name] = np.abs(np.array(answers, float) - stack.defocus_um[planes]).mean()
    assert off["after"] < 0.8 * off["before"]
    # and it is a model like any other
    assert code_of_command("models", "check", str(copy)) == 0
    assert code_of_command("models", "show", str(copy)) == 0
    assert "sigma 0." in capsys.readouterr().out


def test_a_lens_that_does_not_help_is_not_written(
    dataset: Dataset, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm_autofocus.training import lens_fit

    def wrong(*_: Any, **__: Any) -> np.ndarray:
        return np.array([-3, 3, 0, 0, 1], np.float32)

    monkeypatch.setattr(lens_fit, "likeliest", wrong)
    copy = tmp_path / "mine.onnx"
    words = ["calibrate", str(dataset.path), "--model", MODEL, "--fit-lens", str(copy)]
    assert code_of_command(*words) == 0
    assert "no better: not written" in capsys.readouterr().out
    assert not copy.exists()


def test_a_copy_is_calibrated_on_a_slide(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, settings = tmp_path / "slide.onnx", tmp_path / "slide.yaml"
    words = ["calibrate", str(dataset.path), "--model", MODEL, "--fit-curve", str(copy)]
    assert code_of_command(*words, "-o", str(settings), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    curve = said["curve"]
    assert (said["model"], said["lens"]) == (str(copy), None)
    # of another condenser than the usual one: the curve mends what it can
    assert curve["mae_um"] < 0.9 * curve["mae_before_um"]
    assert "on fields that its curve was not found by" in settings.read_text()
    before, after = load_model(MODEL), load_model(copy)
    assert isinstance(after, OnnxModel)
    assert after.card.curve is not None
    assert after.card.curve.fitted["model"] == MODEL
    assert after.card.error != before.card.error
    stack = dataset.labelled[0]
    for k in range(1, len(stack.z_um), 3):
        one, other = (m.predict([stack.plane(k)], max_value=255) for m in (before, after))
        assert other.defocus_um == pytest.approx(after.card.curve.of(one.defocus_um))
    assert code_of_command("models", "check", str(copy)) == 0
    capsys.readouterr()
    assert code_of_command("models", "show", str(copy)) == 0
    assert "calibration curve" in capsys.readouterr().out
    # on the next slide it begins with the model itself, and so does the lens
    again = tmp_path / "again.onnx"
    words[3], words[-1] = str(copy), str(again)
    assert code_of_command(*words) == 0
    assert "curve         the model says" in capsys.readouterr().out
    second = load_model(again)
    assert second.card.curve.said_um == after.card.curve.said_um
    assert lens_model(copy).card.curve is None


def test_a_net_with_its_card_beside_it_is_calibrated_too(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = load_model(MODEL)
    assert isinstance(own, OnnxModel)
    onnx = pytest.importorskip("onnx")
    foreign = onnx.load(own.net.path)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    card = json.loads(own.card.model_copy(update={"sha256": UNSEALED}).to_json())
    (tmp_path / "foreign.card.yaml").write_text(yaml.safe_dump(card))
    copy = tmp_path / "slide.onnx"
    words = ["calibrate", str(dataset.path), "--model", str(tmp_path / "foreign.onnx")]
    assert code_of_command(*words, "--fit-curve", str(copy)) == 0
    after = load_model(copy)
    assert after.card.curve is not None
    assert after.card.sealed


def test_a_model_of_two_looks_is_calibrated_too(dataset: Dataset, tmp_path: Path) -> None:
    model = onnx_model(f"{MODEL}-two-look", "--fit-curve")
    fit = fit_curve(model, dataset.labelled)
    # the middles whose looks lie 8 µm below and above
    assert (fit.fields, fit.frames) == (2, 2 * len(range(-18, 19, 2)))
    write_curve(model, tmp_path / "slide.onnx", fit, data="stacks")
    after = load_model(tmp_path / "slide.onnx")
    stack = dataset.labelled[0]
    planes = next(iter(looks_at(stack.z_um, model.card.looks_um).values()))
    looks = [stack.plane(k) for k in planes]
    one, other = (m.predict(looks, max_value=255) for m in (model, after))
    assert other.defocus_um == pytest.approx(fit.curve.of(one.defocus_um))


def test_a_curve_that_does_not_help_is_not_written(
    dataset: Dataset, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm_autofocus.models.card import Curve
    from mm_autofocus.training import curve_fit

    wrong = Curve(said_um=(-1.0, 1.0), defocus_um=(4.0, 6.0))
    monkeypatch.setattr(curve_fit, "curve_through", lambda *_: wrong)
    copy = tmp_path / "slide.onnx"
    words = ["calibrate", str(dataset.path), "--model", MODEL, "--fit-curve", str(copy)]
    assert code_of_command(*words) == 0
    said = capsys.readouterr().out
    assert "no better: not written" in said
    assert not copy.exists()
    # the model was tried on these stacks all the same
    assert f"model: {MODEL}" in said
    assert "strategy: one-shot" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit-lens", "NEW.onnx"], "needs a model with --model"),
        (["--fit-curve", "NEW.onnx"], "needs a model with --model"),
        (
            ["--fit-lens", "NEW.onnx", "--fit-curve", "NEWER.onnx", "--model", MODEL],
            "only one at a time",
        ),
        (["--fit-lens", "NEW.txt", "--model", MODEL], "NEW.txt"),
        (["--fit-lens", "NEW.onnx", "--model", f"{MODEL}-two-look"], "cannot be told"),
        (["--fit-lens", "there.onnx", "--model", MODEL], "exists already"),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence(
    dataset: Dataset, tmp_path: Path, monkeypatch, capsys, words, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").touch()
    assert code_of_command("calibrate", str(dataset.path), *words) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["there.onnx"]


def test_a_net_that_nobody_tells_is_not_trained(tmp_path: Path) -> None:
    silent = make_dataset(tmp_path)
    net = {**blurred.NET, "spectra": 8, "lens": {"sigma": (0.45, 0.75)}}
    options = read_options({**OPTIONS, "net": net})
    with pytest.raises(InputError, match=r"net.lens: of no stack of .* sigma are known"):
        prepare(silent, tmp_path / "other", options)
    assert not (tmp_path / "other").exists()
    known = [replace(s, lens={"sigma": 0.75}) for s in silent.stacks]
    job = prepare(Dataset(silent.path, silent.meta, known), tmp_path / "run", options)
    assert job.patches[0]["lens"].tolist() == [1, 1]


def test_what_the_stacks_lack_is_said_before_the_stage_moves(
    dataset: Dataset, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: Any) -> None:
        raise AssertionError("the microscope was opened")

    monkeypatch.setattr("mm_autofocus.calibrating.open_core", opened)
    one = Dataset(dataset.path, dataset.meta, dataset.stacks[:1])
    monkeypatch.setattr(Dataset, "open", lambda _: one)
    words = ["calibrate", str(dataset.path), "--config", "virtual_slide.cfg", "--model", MODEL]
    assert code_of_command(*words, "--fit-lens", str(tmp_path / "new.onnx")) == 2
    assert "at least 2 fields" in capsys.readouterr().err


def test_the_option_that_the_readme_names() -> None:
    sets = cli.parse_sets(["net.lens={sigma: [0.45, 0.75]}", "net.spectra=8"])
    options = read_options(merge_sets({}, sets))
    assert build_net("sparsefocus", context(), options.net).lens == {"sigma": (0.45, 0.75)}


def test_one_field_is_too_few(dataset: Dataset) -> None:
    with pytest.raises(InputError, match=r"at least 2 fields.*there are 1"):
        fit_lens(lens_model(MODEL), dataset.labelled[:1])
