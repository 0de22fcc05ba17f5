"""The README: its commands run, and its settings and links exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from mm_autofocus import cli
from mm_autofocus.settings import parse_settings

from conftest import PLANS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    match = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)```\n<!-- end -->", README, re.DOTALL)
    assert match is not None, marker
    return match.group(1)


def test_the_commands_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(PLANS, tmp_path / "acquisition_plans")
    monkeypatch.chdir(tmp_path)
    names = ("run: commands", "run: recover", "run: learn", "run: lens")
    lines = [line for name in names for line in block(name).splitlines()]
    for line in lines:
        if line.startswith("#"):
            continue
        # the reader's half an hour is not ours: a glance at every step of the way
        program, *args = shlex.split(line.replace("max_minutes=30", "max_minutes=0.05"))
        assert program == "mm-autofocus"
        with pytest.raises(SystemExit) as e:
            cli.main(args)
        assert e.value.code in (0, None), line
    assert (tmp_path / "run.html").stat().st_size > 10_000
    assert (tmp_path / "dataset" / "dataset.json").is_file()
    recommended = yaml.safe_load((tmp_path / "recommended.yaml").read_text(encoding="utf-8"))
    parse_settings(recommended["metadata"]["mm_autofocus"])
    assert (tmp_path / "evaluation" / "report.html").is_file()
    assert (tmp_path / "fused.ome.tiff").is_file()
    assert (tmp_path / "refocus.onnx").is_file()
    assert (
        yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))["metadata"][
            "mm_autofocus"
        ]["model"]
        == "mine.onnx"
    )
    assert "3 searches, 0 to distrust" in capsys.readouterr().out


def test_the_demo_is_what_the_install_line_ends_with() -> None:
    assert block("demo-command").strip().endswith("&& mm-autofocus demo")
    assert block("test-command").strip().startswith("pip install -e")


def test_the_settings_it_shows_are_settings() -> None:
    for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
        data = yaml.safe_load(text)
        parse_settings(data["metadata"]["mm_autofocus"])


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
