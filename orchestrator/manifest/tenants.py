"""The keys of `gateway.tenants`: what requests of a cache salt are worth beside others. Pure."""

from typing import Annotated

from pydantic import Field

from orchestrator.manifest.section import Allowed, Section, inconsistent
from workers.api import MAX_SALT_CHARS


class Tenant(Section):
    """Requests of one cache salt."""

    cache_salt: Annotated[
        str, Field(max_length=MAX_SALT_CHARS), Allowed(f"at most {MAX_SALT_CHARS} characters")
    ] = Field(description="As in its requests.")
    weight: float = Field(
        gt=0, le=1e6, description="What it is worth beside tenants that are not named, which have 1."
    )


def check_tenants(tenants: tuple[Tenant, ...]) -> tuple[Tenant, ...]:
    """Each is there once."""
    salts = [one.cache_salt for one in tenants]
    inconsistent(
        [
            ((i, "cacheSalt"), f"{salt!r} is there already; one weight is enough")
            for i, salt in enumerate(salts)
            if salt in salts[:i]
        ]
    )
    return tenants
