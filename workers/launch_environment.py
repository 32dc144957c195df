"""Environment variables that a worker process must be started with. Pure."""

from collections.abc import Mapping

#: gRPC allocates every message anew. With glibc's defaults each is mapped and unmapped, and its pages
#: fault again; kept in the heap, KV moves about twice as fast. glibc reads these at process start only.
LAUNCH_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_ARENA_MAX": "2",
    # torch's OpenMP threads wait long for their next work before they sleep, on the cores that our kernels' threads
    # want next; while other processes want them too, a step takes several times as long. libgomp reads this when it
    # is loaded.
    "GOMP_SPINCOUNT": "1000",
}


def missing_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of LAUNCH_ENVIRONMENT that are not set there, to whatever value."""
    return {name: value for name, value in LAUNCH_ENVIRONMENT.items() if name not in environment}
