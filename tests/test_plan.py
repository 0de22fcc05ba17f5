"""Plans: read strictly, with file and line in each complaint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import useq
from mm_autofocus.errors import InputError
from mm_autofocus.plan import fresh, load_plan, planned_home_um, settings_of, z_offsets_um

GOOD = """\
stage_positions:
  - {x: 0, y: 0, z: 1}
autofocus_plan: {axes: [p]}
metadata:
  mm_autofocus:
    strategy: hill-climb
    range_um: 10
"""

BAD = {
    "does not parse": (GOOD + "  a: [1\n", ":9: does not parse as YAML"),
    "empty": ("", "is empty"),
    "a list": ("- 1\n- 2\n", ":1: a plan is a mapping"),
    "typo in a plan's key": (
        GOOD.replace("stage_positions", "stage_position"),
        ":1: stage_position: unknown key of a plan (did you mean 'stage_positions'?)",
    ),
    "typo in the autofocus plan": (
        GOOD.replace("axes", "axis"),
        ":3: autofocus_plan.axis: unknown key (did you mean 'axes'?)",
    ),
    "typo in the settings": (
        GOOD.replace("range_um", "range"),
        ":7: metadata.mm_autofocus.range: unknown key (did you mean 'range_um'?)",
    ),
    "bad value in the settings": (
        GOOD.replace("10", "ten"),
        ":7: metadata.mm_autofocus.range_um: 'ten' is not allowed",
    ),
    "useq's own complaint": (GOOD + "z_plan: {range: 3, step: x}\n", ":8: z_plan"),
    "absolute z with autofocus": (
        GOOD + "z_plan: {top: 3, bottom: 1, step: 1}\n",
        "absolute Z positions cannot be used with autofocus plan",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_names_file_and_line(case: str, tmp_path: Path) -> None:
    text, sentence = BAD[case]
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as e:
        load_plan(path)
    assert str(e.value).startswith(str(path))
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_plan(tmp_path / "nope.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_plan(tmp_path)


def test_yaml_json_dict_and_sequence_are_the_same_plan(tmp_path: Path) -> None:
    yaml_path, json_path = tmp_path / "plan.yaml", tmp_path / "plan.json"
    yaml_path.write_text(GOOD)
    plan = load_plan(yaml_path)
    json_path.write_text(plan.model_dump_json(exclude_unset=True))
    assert load_plan(json_path) == plan
    assert load_plan(json.loads(json_path.read_text())) == plan
    assert load_plan(plan) == plan
    # a file that useq itself wrote, uid and all, is read as well
    yaml_path.write_text(plan.yaml())
    assert load_plan(yaml_path) == plan


def test_overrides_reach_into_nested_settings() -> None:
    plan = load_plan(
        {"metadata": {"mm_autofocus": {"metric_options": {"tiles": 2}}}},
        strategy="sweep",
        overrides={"range_um": 3, "metric_options.normalize": True},
    )
    settings = settings_of(plan)
    assert settings is not None
    assert (settings.strategy, settings.range_um) == ("sweep", 3.0)
    assert settings.metric_options.tiles == 2
    assert settings.metric_options.normalize


def test_a_plan_without_settings_stays_without() -> None:
    assert settings_of(load_plan({"channels": ["FITC"]})) is None


def test_fresh_forgets_what_autofocus_plans_have_seen() -> None:
    sub = useq.MDASequence(autofocus_plan={"axes": ("c",)})
    plan = useq.MDASequence(
        stage_positions=[{"x": 0, "y": 0, "sequence": sub}, {"x": 1, "y": 0}],
        autofocus_plan={"axes": ("p",)},
        channels=["FITC"],
    )
    expected = [e.action.type for e in plan]
    assert [e.action.type for e in plan] != expected  # the trap
    for _ in range(2):
        assert [e.action.type for e in fresh(plan)] == expected
    assert fresh(plan).uid == plan.uid


def test_homes_and_reach() -> None:
    plan = useq.MDASequence(
        stage_positions=[{"x": 0, "y": 0, "z": 7}, {"x": 0, "y": 0}],
        z_plan={"relative": [-2, 0, 3]},
        channels=[{"config": "FITC", "z_offset": 1.5}, {"config": "DAPI", "z_offset": -1}],
    )
    homes = {e.index["p"]: planned_home_um(e, plan) for e in plan}
    assert homes == {0: 7.0, 1: None}
    assert z_offsets_um(plan) == (-3.0, 4.5)
    assert z_offsets_um(useq.MDASequence(channels=["FITC"])) == (0.0, 0.0)
