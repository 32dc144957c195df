"""Profile files: what was written comes back, and what is wrong is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.profile import PROFILE
from workers.errors import ProfileError
from workers.limits import WEIGHT_BYTES
from workers.loaded_shapes import cpu_shape
from workers.profile import from_json, misfit, read, to_json


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


#: A worker that the profile below is of.
FITTING: dict[str, Any] = {
    "model_source": "/m/smollm2-135m",
    "is_on_gpu": False,
    "num_threads": 1,
    "tensor_parallel": 1,
    "weight_dtype": "float32",
    "kv_dtype": "auto",
}
ON_CPU = replace(PROFILE, costs=replace(PROFILE.costs, device=cpu_shape(1, 2**34)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"model_source": "./other/smollm2-135m"}, None),
        ({"kv_dtype": "fp8"}, None),
        ({"tensor_parallel": 2}, "is of one device, and the layers are spread over 2"),
        (
            {"model_source": "package:m"},
            (
                "is of smollm2-135m, and the model is package:m; `phasewise calibrate --model package:m "
                "--weight-dtype float32 --threads 1` writes one that fits"
            ),
        ),
        (
            {"is_on_gpu": True, "weight_dtype": "fp8", "kv_dtype": "fp8"},
            (
                "is of cpu, and the worker computes on a GPU; `phasewise calibrate --model /m/smollm2-135m "
                "--weight-dtype fp8 --device cuda --kv-dtype fp8` writes one that fits"
            ),
        ),
        ({"weight_dtype": "bfloat16"}, "is of weights of 4 bytes, and the worker keeps them in bfloat16;"),
        ({"num_threads": 2}, "is of a worker with threads: 1, and this one has 2;"),
    ],
)
def test_why_a_profile_is_none_for_a_worker_and_what_writes_one(
    changed: dict[str, Any], said: str | None
) -> None:
    problem = misfit(ON_CPU, **{**FITTING, **changed})
    assert problem is None if said is None else problem is not None and problem.startswith(said)


@pytest.mark.parametrize(
    ("weight_bytes", "dtypes"),
    [
        (4.0, {"float32"}),
        (2.0, {"bfloat16", "float16"}),
        (1.0, {"int8", "fp8"}),
        # The layers in one byte, and the LM head in two.
        (1.07, {"fp8"}),
    ],
)
def test_how_a_gpu_keeps_weights_is_told_by_their_bytes_and_threads_do_not_count(
    weight_bytes: float, dtypes: set[str]
) -> None:
    costs = replace(PROFILE.costs, model=replace(PROFILE.costs.model, weight_bytes=weight_bytes))
    options = {**FITTING, "is_on_gpu": True, "num_threads": 8}
    found = {
        dtype
        for dtype in WEIGHT_BYTES
        if misfit(replace(PROFILE, costs=costs), **{**options, "weight_dtype": dtype}) is None
    }
    assert found == dtypes


def test_a_file_that_cannot_be_read_is_named_with_the_command_that_writes_one(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, said in (("none.json", "cannot be read: No such file"), ("binary", "is no profile: 'utf-8'")):
        with pytest.raises(ProfileError) as refused:
            read(tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name}: {said}")
        assert str(refused.value).endswith("`phasewise calibrate` writes one")
