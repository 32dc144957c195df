"""Settings that all tests share.

HYPOTHESIS_PROFILE=long searches longer, and with other examples in every run.
"""

import gc
import os
import signal

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("long", deadline=None, max_examples=2000)
profile = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(profile)
if profile == "ci":
    # Else some examples are constants of whatever modules of ours the process has loaded, and others with each change to any.
    # There is no setting for it.
    assert callable(providers._get_local_constants)
    providers._get_local_constants = Constants


def pytest_collection_finish() -> None:
    """What thousands of tests and their modules are made of is looked through by no later collection of garbage: that was half of
    the time of many.
    """
    gc.collect()
    gc.freeze()


# A shell has what it starts in the background ignore Ctrl-C, and children inherit that; some that tests start have it pressed.
# Not by a function between fork and exec: gRPC, which runs here, has forks call it, and may abort the child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
