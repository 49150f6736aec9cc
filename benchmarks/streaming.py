"""An answer of 64 MB as a stream of chunks, against the same bytes in other ways: one run.

    python benchmarks/streaming.py

A server process without a model sends one tensor. The lines say how fast it is by Forward's stream,
made and read by the product's own code with checksums on both sides, over how fast it is

* in one message: a unary call, limits raised, whose bytes become an array at the end;
* as a bare stream: the same chunks without checksums, which nobody puts together.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import turns

from moorage.assembly import Assembly
from moorage.transport import OPTIONS
from moorage.v1 import moorage_pb2 as pb
from moorage.v1 import moorage_pb2_grpc as pb_grpc

ROWS, LENGTH, VOCABULARY = 4, 128, 32_768
ANSWER_BYTES = 4 * ROWS * LENGTH * VOCABULARY  # 64 MiB

_NO_LIMITS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--serve", action="store_true", help="be the server; prints its port")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        measure(f"127.0.0.1:{int(process.stdout.readline())}", args.rounds)
    finally:
        process.kill()
        process.wait()


def measure(address: str, rounds: int) -> None:
    """Prints the figures."""
    with (
        grpc.insecure_channel(address, options=OPTIONS) as channel,
        grpc.insecure_channel(address, options=_NO_LIMITS) as unlimited,
    ):
        forward = pb_grpc.ScoringServiceStub(channel).Forward
        bare = channel.unary_stream("/bench/Bare", **wire(pb.ForwardResponse))
        whole = unlimited.unary_unary("/bench/Whole", **wire(pb.TensorChunk))
        runs = {
            "stream": turns.timed(lambda: streamed(forward)),
            "one message": turns.timed(lambda: unary(whole)),
            "bare stream": turns.timed(lambda: drained(bare)),
        }
        taken = turns.take_turns(runs, rounds)
    print(turns.HEADER)
    turns.show("64 MB: MB/s by the stream", [ANSWER_BYTES / 1e6 / s for s in taken["stream"]])
    for other, target in (("one message", ">= 4.0"), ("bare stream", ">= 0.8")):
        name = f"64 MB: speed by the stream / {other}"
        turns.show(name, turns.ratios(taken[other], taken["stream"]), target)


def streamed(forward: Any) -> object:
    """As the client reads an answer."""
    request = pb.ForwardRequest(row_lengths=[LENGTH] * ROWS)
    request.outputs.names.append("logits")
    assembly = Assembly(request)
    for response in forward(assembly.begin()):
        assembly.add(response)
    return assembly.scores()


def unary(whole: Any) -> object:
    return np.frombuffer(whole(pb.ForwardRequest()).data, np.float32).reshape(-1, VOCABULARY)


def drained(bare: Any) -> object:
    return sum(1 for _ in bare(pb.ForwardRequest()))


def wire(response: Any) -> dict[str, Any]:
    return {
        "request_serializer": pb.ForwardRequest.SerializeToString,
        "response_deserializer": response.FromString,
    }


async def serve() -> None:
    """Serves one tensor in every way, until it is killed."""
    from moorage_server import answering

    tensor = np.random.default_rng(0).normal(size=(ROWS * LENGTH, VOCABULARY)).astype(np.float32)
    said = pb.TensorHeader(
        name="logits", dtype="float32", shape=tensor.shape, row_lengths=[LENGTH] * ROWS
    )

    class Scoring(pb_grpc.ScoringServiceServicer):
        """Forward as the service sends it."""

        async def Forward(  # noqa: N802
            self, request: pb.ForwardRequest, context: Any
        ) -> AsyncIterator[pb.ForwardResponse]:
            yield pb.ForwardResponse(header=pb.ForwardHeader(tensors=[said]))
            for response in answering.chunks([tensor]):
                yield response

    async def bare(request: pb.ForwardRequest, context: Any) -> AsyncIterator[pb.ForwardResponse]:
        view = memoryview(tensor).cast("B")
        for offset in range(0, len(view), answering.CHUNK_BYTES):
            data = bytes(view[offset : offset + answering.CHUNK_BYTES])
            yield pb.ForwardResponse(chunk={"offset": offset, "data": data})

    async def whole(request: pb.ForwardRequest, context: Any) -> pb.TensorChunk:
        return pb.TensorChunk(data=tensor.tobytes())

    ways = {
        "request_deserializer": pb.ForwardRequest.FromString,
        "response_serializer": lambda message: message.SerializeToString(),
    }
    handlers = {
        "Bare": grpc.unary_stream_rpc_method_handler(bare, **ways),
        "Whole": grpc.unary_unary_rpc_method_handler(whole, **ways),
    }
    server = grpc.aio.server(options=[*_NO_LIMITS, ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    pb_grpc.add_ScoringServiceServicer_to_server(Scoring(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    main()
