"""Settings: what is accepted, and the one sentence for what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mm_autofocus.errors import InputError
from mm_autofocus.settings import (
    AutofocusSettings,
    EscalationStep,
    parse_settings,
    settings_for,
)

BAD = {
    "unknown key": ({"strategi": 1}, "strategi: unknown key (did you mean 'strategy'?)"),
    "unknown strategy": (
        {"strategy": "hillclimb"},
        "strategy: 'hillclimb' is unknown (did you",
    ),
    "unknown measure": ({"metric": "bremner"}, "metric: 'bremner' is unknown (did you mean 'b"),
    "unit in the value": (
        {"range_um": "20 um"},
        "range_um: '20 um' is not allowed: must be a n",
    ),
    "wrong type": ({"max_looks": 2.5}, "max_looks: 2.5 is not allowed"),
    "negative range": (
        {"range_um": -3},
        "range_um: -3 is not allowed: must be greater than 0 (µm",
    ),
    "negative step": (
        {"step_um": -1.0},
        "step_um: -1.0 is not allowed: must be greater than 0",
    ),
    "not a number": ({"range_um": float("nan")}, "range_um: nan is not allowed"),
    "limits reversed": ({"z_min_um": 4, "z_max_um": 2}, "z_min_um: 4 is not below z_max_um: 2"),
    "step beyond range": ({"step_um": 30.0}, "step_um: 30 is larger than range_um: 20"),
    "policy": ({"on_failure": "stop"}, "must be one of 'keep', 'skip', 'pause' or 'abort'"),
    "nested unknown": (
        {"metric_options": {"tile": 3}},
        "metric_options.tile: unknown key (did yo",
    ),
    "escalate unknown": ({"escalate": ["foo"]}, "escalate.0.strategy: 'foo' is unknown"),
    "escalate key": (
        {"escalate": [{"strategy": "brent", "range": 3}]},
        "escalate.0.range: unknown key (did you mean 'range_um'?)",
    ),
    "escalate to hardware": ({"escalate": ["hardware"]}, "'hardware' can only come first"),
    "learned without a model": (
        {"strategy": "one-shot"},
        "mm_autofocus.model: strategy 'one-shot' needs a model: a shipped name",
    ),
    "escalate to learned without a model": (
        {"escalate": ["two-look"]},
        "mm_autofocus.model: strategy 'two-look' needs a model",
    ),
    "shadow without a model": (
        {"shadow": {"strategy": "one-shot"}},
        "mm_autofocus.model: strategy 'one-shot' needs a model",
    ),
    "shadow key": (
        {"shadow": {"modle": "x"}},
        "shadow.modle: unknown key (did you mean 'model'?); allowed: strategy, model",
    ),
    "too many corrections": ({"max_corrections": 6}, "max_corrections: 6 is not allowed"),
    "na beyond air": ({"na": 1.2}, "na: 1.2 is not between 0 and the refractive index 1.0"),
    "crop without roi": ({"crop": True}, "crop: true needs roi"),
    "not a mapping": (5, "5 is not a mapping of settings"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence_with_its_key(case: str) -> None:
    data, sentence = BAD[case]
    with pytest.raises(InputError) as e:
        parse_settings(data)
    assert sentence in str(e.value)
    assert str(e.value).startswith("metadata.mm_autofocus")
    assert "\n" not in str(e.value)


def test_defaults_and_names_as_steps() -> None:
    settings = parse_settings({"escalate": ["sweep", {"strategy": "brent", "range_um": 3}]})
    assert settings.strategy == "hill-climb"
    assert settings.escalate == (
        EscalationStep(strategy="sweep"),
        EscalationStep(strategy="brent", range_um=3.0),
    )
    assert parse_settings(None) == AutofocusSettings()
    assert parse_settings(settings) is settings


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "range_um": st.floats(0.1, 1e3),
            "max_looks": st.integers(3, 50),
            "backlash_um": st.floats(-10, 10),
            "on_failure": st.sampled_from(["keep", "skip", "pause", "abort"]),
            "roi": st.tuples(*[st.integers(1, 99)] * 4).map(list),
            "metric": st.sampled_from(["brenner", "tenengrad"]),
        },
    )
)
def test_what_is_written_is_read_back(data: dict[str, object]) -> None:
    settings = parse_settings(data)
    assert parse_settings(settings.model_dump(mode="json")) == settings


LEARNED = {
    "one-shot": {"strategy": "one-shot", "model": "m.onnx"},
    "a list of providers": {"strategy": "one-shot", "model": "m.onnx", "providers": ["cpu"]},
    "one provider": {"strategy": "one-shot", "model": "m.onnx", "providers": "cpu"},
    "to a classic one": {
        "strategy": "one-shot",
        "model": "m.onnx",
        "escalate": ["one-shot", "hill-climb"],
    },
    "to a learned one": {"escalate": ["two-look"], "model": "m.onnx"},
    "to one with its model": {"escalate": [{"strategy": "two-look", "model": "m.onnx"}]},
    "shadow": {"shadow": {"strategy": "two-look", "model": "m.onnx"}},
    "shadow by the model of all": {"shadow": {}, "model": "m.onnx"},
}


@pytest.mark.parametrize("case", LEARNED)
def test_learned_strategies_are_accepted_with_a_model(case: str) -> None:
    settings = parse_settings(LEARNED[case])
    assert settings.verify
    assert settings.providers in ((), ("cpu",))
    # the file keeps them as JSON, and a later run takes them from there
    assert parse_settings(settings.model_dump(mode="json", exclude_unset=True)) == settings


def test_a_step_gets_the_shared_settings_and_its_own_model() -> None:
    settings = parse_settings(
        {"range_um": 7, "model": "a.onnx", "card": "a.yaml", "escalate": ["one-shot"]}
    )
    step = settings_for("one-shot", settings, model="b.onnx")
    assert (step.strategy, step.range_um, step.escalate) == ("one-shot", 7, ())
    assert (step.model, step.card) == ("b.onnx", None)
    same = settings_for("one-shot", settings)
    assert (same.model, same.card) == ("a.onnx", "a.yaml")
