"""gRPC channels to the gateway, from the controller and the command line, and from the controller to workers."""

import grpc.aio

#: Addresses are the cluster's own: no proxy. A peer that comes back is found within a second.
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port; it connects at the first call. Its owner closes it."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
