"""When a soak says that memory grows."""

import pytest

from benchmarks.serving.soak_gpu import growth_mib


@pytest.mark.parametrize(
    ("rounds", "a_round", "all_of_them"),
    [
        # The first round takes what is kept.
        ([100, 900, 900, 900], 0, 0),
        # Once.
        ([100, 900, 900, 972, 972, 972], 0, 72),
        ([100, 900, 905, 910, 915], 5, 15),
        # Now and then.
        ([100, 900, 900, 1400, 1400, 1400, 1900], 0, 1000),
        # A little up and down.
        ([100, 900, 902, 899, 901], 2, 1),
        ([100, 900, 880, 870], -15, -30),
        ([100, 900, 903], 3, 3),
    ],
)
def test_growth_is_what_most_rounds_add_and_what_all_do(
    rounds: list[float], a_round: float, all_of_them: float
) -> None:
    assert growth_mib([{"host": mib} for mib in rounds]) == {"host": (a_round, all_of_them)}
