"""A model that is cut for its ranks and joined again is the same model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from phasewise_kernels.fp8_linear.reference import quantise_reference
from tests.support.device_engine import TINY, random_weights
from workers.api import WeightDtype
from workers.device.gpu import placed
from workers.model.config import ModelConfig
from workers.model.convert import output_shapes
from workers.model.fp8 import is_matrix
from workers.tensor_parallel.cutting import (
    WHOLE,
    Cut,
    Rank,
    cut,
    cut_shape,
    cuts,
    degrees,
    kv_heads,
    problem,
    rank_config,
    vocab_rows,
)
from workers.tensor_parallel.reading import part_shapes, read_part


def config_of(**changes: Any) -> ModelConfig:
    return replace(TINY, **changes)


@st.composite
def models_and_degrees(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """Any model and any degree that fits it."""
    degree = draw(st.sampled_from((1, 2, 3, 4, 6, 8)))
    if draw(st.booleans()):
        num_kv_heads = degree * draw(st.integers(1, 2))
    else:
        num_kv_heads = draw(st.sampled_from([one for one in (1, 2, 3, 4) if degree % one == 0]))
    num_heads = num_kv_heads * degree * draw(st.integers(1, 2))
    config = config_of(
        num_layers=draw(st.integers(1, 2)),
        hidden_size=8,
        head_dim=2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=degree * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(8 * degree, 70)),
        tie_embeddings=draw(st.booleans()),
        has_qkv_bias=draw(st.booleans()),
        has_attention_out_bias=draw(st.booleans()),
        has_mlp_bias=draw(st.booleans()),
        has_qk_norm=draw(st.booleans()),
    )
    return config, degree


def taken(values: torch.Tensor, one: Cut) -> torch.Tensor:
    if one == WHOLE:
        return values
    return torch.cat([values.narrow(one.dim, lo, hi - lo) for lo, hi in one.ranges], dim=one.dim)


def put(target: torch.Tensor, one: Cut, part: torch.Tensor) -> None:
    """The part where it was taken from, which may be there from another rank, and is the same then."""
    if one == WHOLE:
        one = Cut(0, ((0, len(target)),))
    begin = 0
    for lo, hi in one.ranges:
        place = target.narrow(one.dim, lo, hi - lo)
        piece = part.narrow(one.dim, begin, hi - lo)
        assert bool((torch.isnan(place) | (place == piece)).all())
        place.copy_(piece)
        begin += hi - lo


@given(models_and_degrees())
def test_parts_joined_are_the_whole(model: tuple[ModelConfig, int]) -> None:
    config, degree = model
    assert problem(config, degree) is None
    weights = random_weights(config)
    joined = {name: torch.full_like(values, float("nan")) for name, values in weights.items()}
    for index in range(degree):
        rank = Rank(index, degree)
        for name, one in cuts(output_shapes(config), config, rank):
            part = taken(weights[name], one)
            assert tuple(part.shape) == cut_shape(tuple(weights[name].shape), one)
            put(joined[name], one, part)
    assert all(torch.equal(joined[name], values) for name, values in weights.items())


@given(models_and_degrees())
def test_a_rank_has_the_tensors_of_its_own_model(model: tuple[ModelConfig, int]) -> None:
    config, degree = model
    for index in range(degree):
        rank = Rank(index, degree)
        own = output_shapes(rank_config(config, rank))
        lo, hi = vocab_rows(config.vocab_size, rank)
        for name, one in cuts(output_shapes(config), config, rank):
            shape = cut_shape(output_shapes(config)[name], one)
            assert shape == ((hi - lo, config.hidden_size) if name == "lm_head" else own[name])


@given(models_and_degrees())
def test_what_is_added_once_is_at_rank_0_alone(model: tuple[ModelConfig, int]) -> None:
    config, degree = model
    for name in ("layers.0.attention_out_bias", "layers.0.down_bias"):
        assert [cut(name, config, Rank(index, degree)) is None for index in range(degree)] == [False] + [
            True
        ] * (degree - 1)


@given(models_and_degrees())
def test_query_heads_are_where_the_kv_heads_are_that_they_read(model: tuple[ModelConfig, int]) -> None:
    config, degree = model
    group = config.num_heads // config.num_kv_heads
    for index in range(degree):
        rank = Rank(index, degree)
        own = rank_config(config, rank)
        lo, hi = kv_heads(config.num_kv_heads, rank)
        assert own.num_heads % own.num_kv_heads == 0
        for i in range(own.num_heads):
            of_the_model = index * own.num_heads + i
            assert lo + i // (own.num_heads // own.num_kv_heads) == of_the_model // group < hi


def test_fused_matrices_are_cut_by_each_of_their_parts() -> None:
    config = config_of(num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=6)
    assert cut("layers.1.qkv", config, Rank(1, 2)) == Cut(0, ((16, 32), (40, 48), (56, 64)))
    assert cut("layers.1.gate_up", config, Rank(1, 2)) == Cut(0, ((3, 6), (9, 12)))
    assert cut("layers.1.down", config, Rank(1, 2)) == Cut(1, ((3, 6),))
    with pytest.raises(ValueError, match="no tensor of a model is called layers"):
        cut("layers.0.bias", config, Rank(0, 2))


@pytest.mark.parametrize(
    ("changes", "degree", "says"),
    [
        ({"num_heads": 9, "num_kv_heads": 3}, 2, "9 attention heads"),
        ({"num_heads": 12, "num_kv_heads": 3}, 2, "3 KV heads"),
        ({"num_heads": 12, "num_kv_heads": 4}, 6, "4 KV heads"),
        ({"num_heads": 4, "num_kv_heads": 4, "intermediate_size": 5}, 2, "an MLP of 5 inner values"),
    ],
)
def test_what_does_not_divide_is_named(changes: dict[str, int], degree: int, says: str) -> None:
    config = config_of(**changes)
    assert problem(config, degree) == says
    assert degree not in degrees(config)
    assert all(problem(config, one) is None for one in degrees(config))
    assert degrees(config)[0] == 1


def test_kv_heads_fewer_than_ranks_are_on_several() -> None:
    assert [kv_heads(2, Rank(i, 4)) for i in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [kv_heads(4, Rank(i, 2)) for i in range(2)] == [(0, 2), (2, 4)]


def test_a_rank_quantises_its_own_parts(tmp_path: Path) -> None:
    weights, path = random_weights(TINY), tmp_path / "model.safetensors"
    save_file(weights, path)
    rank, cpu = Rank(1, 2), torch.device("cpu")
    read = read_part(
        path, TINY, rank, lambda name, one: placed(name, one, cpu, WeightDtype.FP8), lambda _done: None
    )
    for name, one in cuts(output_shapes(TINY), TINY, rank):
        part = taken(weights[name], one)
        if is_matrix(name):
            numbers, scales = quantise_reference(part)
            assert torch.equal(read[name].view(torch.uint8), numbers.view(torch.uint8))
            assert torch.equal(read[f"{name}_scales"], scales[:, 0])
        else:
            assert torch.equal(read[name], part.bfloat16())


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_rank_reads_its_parts_of_the_file(tmp_path: Path, is_tied: bool) -> None:
    config = config_of(tie_embeddings=is_tied, has_qkv_bias=True, has_mlp_bias=True, vocab_size=509)
    weights, path = random_weights(config), tmp_path / "model.safetensors"
    save_file(weights, path)
    head = weights["embedding" if is_tied else "lm_head"]
    for index in range(4):
        rank, told = Rank(index, 4), list[float]()
        read = read_part(path, config, rank, lambda name, one: {name: one}, told.append)
        expected = {
            name: taken(weights[name], one) for name, one in cuts(output_shapes(config), config, rank)
        } | {"lm_head": head[slice(*vocab_rows(509, rank))]}
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], values) for name, values in expected.items())
        assert all(values.is_contiguous() for values in read.values())
        assert told == sorted(told)
        assert told[-1] == 1.0
        if is_tied:
            assert (
                read["lm_head"].untyped_storage().data_ptr() == read["embedding"].untyped_storage().data_ptr()
            )
        assert part_shapes(config, rank) == {
            name: tuple(values.shape) for name, values in read.items() if not (is_tied and name == "lm_head")
        }
