"""What a worker process is started with."""

from workers.launch_environment import LAUNCH_ENVIRONMENT, missing_variables


def test_nothing_is_missing_once_it_is_set() -> None:
    assert missing_variables({"PATH": "/bin"}) == LAUNCH_ENVIRONMENT
    assert missing_variables({"PATH": "/bin", **LAUNCH_ENVIRONMENT}) == {}


def test_a_value_that_somebody_chose_stays() -> None:
    assert "MALLOC_ARENA_MAX" not in missing_variables({"MALLOC_ARENA_MAX": "8"})
