"""Models that are counted from their configurations have as many parameters as they are said to have."""

import pytest

from benchmarks.engine.published_shapes import MODELS, Published


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_count_is_what_was_published(model: Published) -> None:
    assert model.encoder.num_weights + model.text.num_weights == pytest.approx(model.num_published, rel=0.005)
