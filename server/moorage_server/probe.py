"""`python -m moorage_server.probe`: asks a server for its health, for engines that run commands."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

#: What `probe` says of a server that takes calls.
SERVING = "SERVING"

_CALL_SECONDS = 3.0
_AGAIN_SECONDS = 0.25
_OPTIONS = [("grpc.enable_http_proxy", 0)]  # a probe asks its own machine


def main(argv: Sequence[str] | None = None) -> int:
    """Asks until the answer is good or the time is over.

    Args:
        argv: The arguments; those of the process if left out.

    Returns:
        The exit code: 0 if the service is SERVING, 1 if not, with the reason on stderr.
    """
    args = _parser().parse_args(argv)
    end = time.monotonic() + args.wait
    while (said := probe(args.address, args.service)) != SERVING:
        if time.monotonic() > end:
            print(f"{args.service or 'the server'} at {args.address}: {said}", file=sys.stderr)
            return 1
        time.sleep(_AGAIN_SECONDS)
    return 0


def probe(address: str, service: str = "") -> str:
    """One question to the health service of a server.

    Args:
        address: host:port of a listener without TLS, as --health-listen opens it.
        service: "" for the server, "ready" for its readiness, or the handle of a model.

    Returns:
        The name of the status, or that of the gRPC code with which the call failed.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(address, _OPTIONS) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            return f"{error.code().name}, {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moorage_server.probe", description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT", help="as --health-listen says")
    parser.add_argument(
        "service", nargs="?", default="", help="ready, or a model's handle; default: the server"
    )
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="ask again for so long"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
