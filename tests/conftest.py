"""Settings that all tests share.

HYPOTHESIS_PROFILE=long searches longer, and with other examples in every run.
"""

import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("long", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A shell has what it starts in the background ignore Ctrl-C, and children inherit that; some that tests start have it pressed.
# Not by a function between fork and exec: gRPC, which runs here, has forks call it, and may abort the child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
