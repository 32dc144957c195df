"""When a soak says that memory grows."""

import pytest

from benchmarks.serving.soak_gpu import growth_mib


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        # The first round takes what is kept.
        ([100, 900, 900, 900], 0),
        # Once.
        ([100, 900, 900, 972, 972, 972], 0),
        ([100, 900, 905, 910, 915], 5),
        # A little up and down.
        ([100, 900, 902, 899, 901], 2),
        ([100, 900, 880, 870], -15),
        ([100, 900, 903], 3),
    ],
)
def test_growth_is_what_most_rounds_add(rounds: list[float], expected: float) -> None:
    assert growth_mib([{"host": mib} for mib in rounds]) == {"host": expected}
