"""Environment variables that a worker process must be started with. Pure."""

from collections.abc import Mapping

#: gRPC allocates every message anew. With glibc's defaults each is mapped and unmapped, and its pages
#: fault again; kept in the heap, KV moves about twice as fast. glibc reads these at process start only.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_ARENA_MAX": "2",
}


def missing_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of MALLOC_ENVIRONMENT that are not set there, to whatever value."""
    return {name: value for name, value in MALLOC_ENVIRONMENT.items() if name not in environment}
