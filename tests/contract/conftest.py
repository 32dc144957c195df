"""What contract tests share."""

from functools import partial

import pytest

from tests.support.kvtransfer_ends import Run, run_whole
from tests.support.kvtransfer_ways import WAYS


@pytest.fixture(params=WAYS)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a scenario of `tests.support.kvtransfer_ends` on one way."""
    return partial(run_whole, request.param)
