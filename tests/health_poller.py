"""Asks a server for its health at a steady rate; light enough for a process of its own."""

import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

HERTZ = 20


def poll(address: str, seconds: float) -> list[float]:
    """Seconds from when each question was due to its answer; fails with the first that is bad."""
    found = []
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(30)
        check = health_pb2_grpc.HealthStub(channel).Check
        begin = time.monotonic()
        for tick in range(int(seconds * HERTZ)):
            due = begin + tick / HERTZ
            time.sleep(max(0.0, due - time.monotonic()))
            answer = check(health_pb2.HealthCheckRequest(), timeout=5.0)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            found.append(time.monotonic() - due)
    return found
