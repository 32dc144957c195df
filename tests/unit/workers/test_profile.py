"""Profile files: what was written comes back, and what is wrong is named."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.profile import PROFILE
from workers.errors import ProfileError
from workers.profile import from_json, to_json


def test_a_profile_comes_back_as_it_was() -> None:
    assert from_json(to_json(PROFILE), file="p.json") == PROFILE


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "format",
            "phasewise-profile/v9",
            "is no profile: format: Input should be 'phasewise-profile/v1'; `phasewise calibrate` writes one",
        ),
        ("threads", 0, "threads: Input should be greater than or equal to 1"),
        ("costs.factors", [1.0, 1.0], "costs.factors.2: Field required"),
        (
            "costs.factors",
            [1.0, -1.0, 1.0, 1.0],
            "costs.factors.1: Input should be greater than or equal to 0",
        ),
        ("costs.device.bytes_per_s", 0, "costs.device.bytes_per_s: Input should be greater than 0"),
        ("costs.device.flops", 1.0, "costs.device.flops: Extra inputs are not permitted"),
        (
            "costs.device.memory_curve",
            [[0.5, 0.5], [0.4, 0.9]],
            "costs.device.memory_curve: Value error, [0.4, 0.9]",
        ),
        ("costs.model.num_layers", "30", "costs.model.num_layers: Input should be a valid integer"),
        ("costs.upper_ratio", 0.5, "costs.upper_ratio: Input should be greater than or equal to 1"),
        ("costs.mean_error", float("nan"), "costs.mean_error: Input should be a finite number"),
        ("steps", [{}], "steps.0.measured_s: Field required"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named(path: str, value: Any, said: str) -> None:
    data = json.loads(to_json(PROFILE))
    *folders, key = path.split(".")
    section = data
    for folder in folders:
        section = section[folder]
    section[key] = value
    with pytest.raises(ProfileError) as refused:
        from_json(json.dumps(data), file="p.json")
    assert f"p.json: {said}" in str(refused.value)


@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["a", "format", "costs"]), inner),
    ).map(json.dumps)
)
def test_what_is_no_profile_has_one_problem_and_the_command_that_writes_one(text: str) -> None:
    with pytest.raises(ProfileError) as refused:
        from_json(text, file="other")
    [line] = str(refused.value).splitlines()
    assert line.startswith("other: is no profile: ")
    assert line.endswith("; `phasewise calibrate` writes one")
