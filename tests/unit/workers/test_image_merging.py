"""Merging in the encoder: what is alike becomes one, what is not stays to the last bit, and the keys travel along."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny_vision_models import LAYOUTS, Layout, write_vision_folder
from workers.api import ImageReduction
from workers.embeddings.kept import KeptEmbeddings, from_numbers, to_numbers
from workers.model.prepare import load_weights, prepare
from workers.model.vision.idefics3 import Idefics3Encoder
from workers.model.vision.idefics3_config import Idefics3Vision
from workers.model.vision.merging import key_places, merge_windows, similarity

#: 8 x 8 squares of 2 x 2 patches.
EVEN = replace(LAYOUTS["tiles"], tile_size=64, image_size=64, longest_edge=64, is_tiled=False)
NEVER, ALWAYS = ImageReduction(global_threshold=0.1, individual_threshold=0.1), ImageReduction(0.01)


def _encoder(folder: Path, layout: Layout) -> Idefics3Encoder:
    write_vision_folder(folder, layout)
    prepared = prepare(str(folder), lambda *_progress: None, folder / "cache")
    vision = prepared.config.vision
    assert isinstance(vision, Idefics3Vision)
    return Idefics3Encoder(vision, load_weights(prepared))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Idefics3Encoder:
    return _encoder(tmp_path_factory.mktemp("merging"), EVEN)


def _pixels(encoder: Idefics3Encoder, image: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
    plan = encoder.config.plan(image.shape[1], image.shape[0])
    return encoder.prepare(image, plan, range(1))[0]


@pytest.mark.parametrize(("side", "expected"), [(8, 16), (5, 13), (2, 1), (1, 1)])
def test_a_grid_of_equal_squares_merges_to_the_least(side: int, expected: int) -> None:
    squares = torch.ones(side**2, 4, 3)
    merged, places = merge_windows(squares, 0.99)
    # Windows of 2 x 2; what is left over at the edges stays.
    assert len(merged) == len(places) == expected
    torch.testing.assert_close(merged, torch.ones(expected, 4, 3))
    assert places.tolist() == sorted(set(places.tolist()))


def test_random_squares_merge_nothing() -> None:
    squares = torch.randn(64, 4, 16, generator=torch.Generator().manual_seed(1))
    merged, places = merge_windows(squares, 0.8)
    assert places.tolist() == list(range(64))
    assert torch.equal(merged, squares)


def test_a_window_alike_becomes_its_mean_at_the_place_of_its_first() -> None:
    squares = torch.randn(16, 1, 32, generator=torch.Generator().manual_seed(1))
    window = [2, 3, 6, 7]
    squares[window] = squares[2] * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    merged, places = merge_windows(squares, 0.9)
    assert places.tolist() == [i for i in range(16) if i not in (3, 6, 7)]
    torch.testing.assert_close(merged[2], 2.5 * squares[2])


def test_similarity_is_the_mean_cosine_of_all_pairs() -> None:
    vectors = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(vectors[:, :, None], vectors[:, None], dim=-1)
    expected = torch.stack([one[~torch.eye(4, dtype=torch.bool)].mean() for one in cosines])
    torch.testing.assert_close(similarity(vectors), expected)


def test_keys_are_the_highest_rounded_up() -> None:
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3])
    assert key_places(scores, 0.2).tolist() == [False, True, False, False, False]
    assert key_places(scores, 0.21).tolist() == [False, True, False, True, False]
    assert not key_places(scores, 0.0).any()
    assert key_places(scores, 1.0).all()


def test_without_merging_embeddings_are_those_of_the_whole_tile(encoder: Idefics3Encoder) -> None:
    pixels = _pixels(encoder, np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    embeddings, kept = encoder.encode_reduced(pixels, NEVER)
    assert kept.offsets == tuple(range(64))
    # 8 per cent of 64, rounded up.
    assert sum(kept.is_key) == 6
    torch.testing.assert_close(embeddings, encoder.encode([pixels])[0], atol=1e-5, rtol=0)


def test_a_picture_that_is_half_blank_merges_that_half(encoder: Idefics3Encoder) -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    image[:, :32] = 255
    pixels = _pixels(encoder, image)
    # Positions are part of what is compared, so that even blank squares are not quite alike.
    embeddings, kept = encoder.encode_reduced(pixels, ImageReduction(0.3))
    assert embeddings.shape == (len(kept), 64)
    columns = [offset % 8 for offset in kept.offsets]
    assert sum(column >= 4 for column in columns) == 32 > sum(column < 4 for column in columns)
    # Deterministic, and keys are of those that are left.
    assert encoder.encode_reduced(pixels, ImageReduction(0.3))[1] == kept


def test_everything_merges_at_the_lowest_threshold_and_one_layer_is_enough(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, replace(EVEN, num_layers=1))
    pixels = _pixels(encoder, np.full((64, 64, 3), 200, np.uint8))
    embeddings, kept = encoder.encode_reduced(pixels, replace(ALWAYS, merge_threshold=1e-6))
    assert len(embeddings) == len(kept) < 64
    assert any(kept.is_key)


@settings(max_examples=50, deadline=None)
@given(
    tiles=st.lists(
        st.sets(st.integers(0, 40), min_size=1).map(lambda some: tuple(sorted(some))), min_size=1, max_size=4
    ),
    seed=st.integers(0, 99),
)
def test_what_travels_is_read_back(tiles: list[tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = [KeptEmbeddings(some, tuple(bool(one) for one in rng.integers(0, 2, len(some)))) for some in tiles]
    assert from_numbers(to_numbers(kept), [41] * len(kept)) == kept
    with pytest.raises(ValueError, match="tiles"):
        from_numbers(to_numbers(kept), [41] * (len(kept) + 1))


@pytest.mark.parametrize("numbers", [(), (0,), (2, 0), (2, 4, 0), (2, 0, 1), (1, 18), (1, 0, 7)], ids=str)
def test_what_makes_no_sense_is_not_read(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tile"):
        from_numbers(numbers, [9])
