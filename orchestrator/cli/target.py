"""Which gateway a verb speaks to, and what to say when it does not answer."""

import argparse
import sys

import grpc

from orchestrator.cli import arguments, exit_codes
from orchestrator.errors import DeploymentNotFound
from orchestrator.runtime.channel import open_channel
from orchestrator.runtime.registry import Registry, RunningDeployment

#: In gRPC's text when there never was a connection, and when there was one.
_NOT_CONNECTED = ("failed to connect to", "errors resolving")
_CONNECTION_LOST = ("Socket closed", "Connection reset")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--address and --name; by default the only deployment that runs on this machine."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--address", type=arguments.address, metavar="HOST:PORT", help="a gateway, wherever it runs"
    )
    where.add_argument(
        "--name", metavar="NAME", help="a deployment started on this machine (default: the only one)"
    )


def gateway_address(args: argparse.Namespace, registry: Registry) -> str:
    """Where clients call the gateway that is meant. Raises DeploymentNotFound."""
    return str(args.address) if args.address else find(registry, args.name).address


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """--control-address and --name, for verbs that ask about a deployment instead of using it."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--control-address",
        type=arguments.address,
        metavar="HOST:PORT",
        help="a gateway's control address, wherever it runs",
    )
    where.add_argument(
        "--name", metavar="NAME", help="a deployment started on this machine (default: the only one)"
    )


def control_address(args: argparse.Namespace, registry: Registry) -> str:
    """The control address of the gateway that is meant. Raises DeploymentNotFound."""
    return str(args.control_address) if args.control_address else find(registry, args.name).control_address


def find(registry: Registry, name: str | None) -> RunningDeployment:
    """The deployment `name`, or with None the only one. Raises DeploymentNotFound."""
    running = registry.list()
    found = [one for one in running if name in (None, one.name)]
    if len(found) != 1:
        raise DeploymentNotFound(name, tuple(one.name for one in running))
    return found[0]


def connect(address: str) -> grpc.aio.Channel:
    """A channel to be used in an `async with`; it connects at the first call.

    Not the synchronous API: there, a Ctrl-C that is raised within gRPC's own code can make closing the
    channel wait for ever (grpc issue 19973). `interruptible.run` cancels the task instead.
    """
    return open_channel(address)


def describe(address: str, error: grpc.RpcError) -> str:
    """One line on why a call to `address` failed."""
    details = " ".join((error.details() or "no reason was given").split())
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return f"what answers at {address} is no Phasewise gateway: {details}"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "Deadline Exceeded" in details:
        # gRPC's own words, on our side: the gateway says what it was doing.
        details = "the gateway had not ended its answer in time"
    if not _is_connection_lost(error):
        return f"{error.code().name}: {details}"
    # The reason stands last in gRPC's text, after the address in each of its forms.
    reason = details.rpartition("remote host: ")[2]
    if any(text in details for text in _NOT_CONNECTED):
        return f"no gateway answers at {address}: {reason}"
    reason = reason.removeprefix("Stream removed (").removesuffix(")")
    return f"the connection to the gateway at {address} was lost: {reason}"


def failed(address: str, error: grpc.RpcError) -> int:
    """Say on stderr why a call to `address` failed; returns the exit code."""
    hint = "; `phasewise status` shows what runs" if _is_connection_lost(error) else ""
    print(describe(address, error) + hint, file=sys.stderr)
    unreachable = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED)
    return exit_codes.UNREACHABLE if error.code() in unreachable else exit_codes.FAILURE


def _is_connection_lost(error: grpc.RpcError) -> bool:
    """The connection failed, as opposed to a gateway that answers UNAVAILABLE."""
    details = error.details() or ""
    known = (*_NOT_CONNECTED, *_CONNECTION_LOST)
    return error.code() is grpc.StatusCode.UNAVAILABLE and any(text in details for text in known)
