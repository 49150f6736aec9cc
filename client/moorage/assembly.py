"""The answer to one request, put together from the chunks of as many calls as it takes."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from moorage import decode
from moorage.errors import DataLoss, Unsupported
from moorage.scores import Scores, check_same
from moorage.v1 import moorage_pb2 as pb

DTYPES = {"float32": "<f4", "int32": "<i4"}
"""The dtypes of tensors as the wire names them, and as they are sent."""


class Assembly:
    """Checks the messages that answer a request, and collects their bytes.

    A call that breaks is made again; what it brings goes on where the bytes have ended.

    Args:
        request: The request that is answered.

    Attributes:
        received: How many bytes have come, over all tensors in their order.
    """

    def __init__(self, request: pb.ForwardRequest) -> None:
        self._request = request
        self._header: pb.ForwardHeader | None = None
        self._headed = False
        self._buffers: list[NDArray[Any]] = []
        self._begins = [0]
        self.received = 0

    @property
    def complete(self) -> bool:
        """Whether every byte has come."""
        return self._header is not None and self.received == self._begins[-1]

    def begin(self) -> pb.ForwardRequest:
        """Begins a call.

        Returns:
            The request for what has not come yet.
        """
        self._headed = False
        self._request.received_bytes = self.received
        return self._request

    def add(self, response: pb.ForwardResponse) -> None:
        """Takes the next message.

        Args:
            response: Progress, the header, or a chunk.

        Raises:
            DataLoss: The message is out of order, damaged, or does not fit the request; if it is
                damaged and may be sent again, `retry_after` is set.
            FailedPrecondition: It is of other weights than what came before.
            Unsupported: A tensor is of a dtype that this client does not know.
        """
        part = response.WhichOneof("part")
        if part == "chunk" and self._headed:
            self._take(response.chunk)
        elif part == "header" and not self._headed:
            self._head(response.header)
        elif part != "progress" or self._headed:
            raise DataLoss(f"an unexpected message came ({part}); call again")

    def scores(self) -> Scores:
        """Gives the scores of a complete answer.

        Returns:
            The outputs by row. The arrays of one output are views of one buffer.

        Raises:
            DataLoss: The header or some bytes are missing.
        """
        if self._header is None or not self.complete:
            raise DataLoss(
                f"the answer ended after {self.received} of {self._begins[-1]} bytes; call again"
            )
        tensors = {
            header.name: np.split(buffer, np.cumsum(header.row_lengths)[:-1])
            for header, buffer in zip(self._header.tensors, self._buffers, strict=True)
        }
        return decode.scores(self._header, tensors)

    def _head(self, header: pb.ForwardHeader) -> None:
        if self._header is None:
            _check(header, self._request)
            self._buffers = [_buffer(tensor) for tensor in header.tensors]
            self._begins = [0, *accumulate(buffer.nbytes for buffer in self._buffers)]
        else:
            check_same(self._header, header)
            if list(self._header.tensors) != list(header.tensors):
                raise DataLoss("the answer went on with other tensors; call again")
        self._header, self._headed = header, True

    def _take(self, chunk: pb.TensorChunk) -> None:
        data = chunk.data  # each access copies
        if chunk.tensor not in range(len(self._buffers)):
            raise DataLoss(f"bytes of tensor {chunk.tensor} of {len(self._buffers)} came")
        buffer = self._buffers[chunk.tensor]
        begin, end = chunk.offset, chunk.offset + len(data)
        next_one = self.received - self._begins[chunk.tensor]
        if begin != next_one or begin < 0 or end > buffer.nbytes:
            raise DataLoss(
                f"bytes {begin} to {end} of the {buffer.nbytes} of tensor {chunk.tensor} came, "
                f"after {self.received} bytes of all; call again"
            )
        if google_crc32c.value(data) != chunk.crc32c:
            raise DataLoss(
                f"bytes {begin} to {end} of tensor {chunk.tensor} do not match their CRC-32C; "
                "call again",
                retry_after=0.0,
            )
        buffer.reshape(-1).view(np.uint8)[begin:end] = np.frombuffer(data, np.uint8)
        self.received += len(data)


def _check(header: pb.ForwardHeader, request: pb.ForwardRequest) -> None:
    if header.handle != request.handle:
        raise DataLoss(f"asked model {request.handle!r}, {header.handle!r} answered")
    wanted = list(request.outputs.names) or ["logprobs"]
    counts = Counter(tensor.name for tensor in header.tensors)
    missing = [n for n in wanted if not any(f"{name}_".startswith(f"{n}_") for name in counts)]
    if missing or counts.total() != len(counts):
        raise DataLoss(f"asked for {wanted}, the answer holds {list(counts.elements())}")
    for tensor in header.tensors:
        _check_tensor(tensor, list(request.row_lengths))


def _check_tensor(tensor: pb.TensorHeader, lengths: list[int]) -> None:
    shape, rows = list(tensor.shape), list(tensor.row_lengths)
    if tensor.dtype not in DTYPES:
        raise Unsupported(
            f"{tensor.name} is {tensor.dtype}; this client reads {', '.join(DTYPES)}: update it"
        )
    fits = len(rows) == len(lengths) and all(
        0 <= n <= m for n, m in zip(rows, lengths, strict=True)
    )
    if not fits or min(shape, default=-1) < 0 or shape[0] != sum(rows):
        raise DataLoss(f"{tensor.name} {shape} of rows of {rows} does not fit rows of {lengths}")


def _buffer(tensor: pb.TensorHeader) -> NDArray[Any]:
    try:
        return np.empty(tuple(tensor.shape), DTYPES[tensor.dtype])
    except (MemoryError, ValueError) as error:
        raise DataLoss(
            f"{tensor.name} {list(tensor.shape)} does not fit into memory ({error})"
        ) from error
