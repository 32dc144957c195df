"""Parts of a kernel's work run side by side, and what goes wrong in one reaches the caller."""

import threading

import pytest

from phasewise_kernels.threads import run_parts


def test_parts_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=60)
    seen: list[int] = []

    def part(number: int) -> None:
        barrier.wait()
        seen.append(number)

    run_parts(part, [(0,), (1,), (2,)])
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_part_that_fails_is_raised_after_all_have_ended(failing: int) -> None:
    seen: list[int] = []

    def part(number: int) -> None:
        if number == failing:
            raise ArithmeticError(number)
        seen.append(number)

    with pytest.raises(ArithmeticError):
        run_parts(part, [(0,), (1,)])
    assert seen == [1 - failing]
    run_parts(part, [(2,), (3,)])
    assert sorted(seen[1:]) == [2, 3]


def test_work_within_work_is_done_by_the_caller() -> None:
    seen: list[int] = []
    run_parts(lambda first: run_parts(seen.append, [(first,), (first + 1,)]), [(0,), (2,)])
    assert sorted(seen) == [0, 1, 2, 3]
