"""What a forward pass gives, put together from the chunks of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from moorage.errors import DataLoss
from moorage.v1 import moorage_pb2 as pb

OUTPUTS: Mapping[str, int] = {"logprobs": 1, "logits": 2}
"""The outputs, and how many axes each has; the first runs over the tokens of all rows."""


@dataclass(frozen=True)
class Scores:
    """The outputs of one forward pass, and what their numbers mean.

    Attributes:
        logprobs: float32 [length] for each row: the log-probability of each token given those
            before it, NaN at the first token of every segment. None if not asked for.
        logits: float32 [length, vocabulary] for each row: after each token. None if not asked for.
        handle: The model that answered.
        model_id: Its id.
        revision: The resolved revision of its checkpoint.
        dtype: The dtype of its parameters.
        compute_dtype: The dtype of the arithmetic.
        temperature: The logits were divided by this before the softmax.
        head_dtype: The dtype of the head, softmax and log-sum-exp.
        first_token: What stands at the first token of a segment.
        queue_seconds: Time spent waiting for the device.
        execute_seconds: Time spent computing.
    """

    logprobs: list[NDArray[np.float32]] | None
    logits: list[NDArray[np.float32]] | None
    handle: str
    model_id: str
    revision: str
    dtype: str
    compute_dtype: str
    temperature: float
    head_dtype: str
    first_token: str
    queue_seconds: float
    execute_seconds: float


@dataclass
class _Tensor:
    """One tensor on its way: its header, its bytes, and how many of them have come."""

    header: pb.TensorHeader
    buffer: NDArray[np.uint8]
    filled: int = 0

    def take(self, chunk: pb.TensorChunk) -> None:
        end = chunk.offset + len(chunk.data)
        where = f"bytes {chunk.offset} to {end} of {self.header.name}"
        if chunk.offset != self.filled or end > self.buffer.size:
            raise DataLoss(
                f"{where} came, but byte {self.filled} of {self.buffer.size} is next; call again"
            )
        if google_crc32c.value(chunk.data) != chunk.crc32c:
            raise DataLoss(f"{where} do not match their CRC-32C; call again")
        self.buffer[chunk.offset : end] = np.frombuffer(chunk.data, np.uint8)
        self.filled = end


@dataclass
class Assembly:
    """Checks the messages of one Forward call and collects their bytes.

    Attributes:
        request: The request that is answered.
    """

    request: pb.ForwardRequest
    _header: pb.ForwardHeader | None = None
    _tensors: list[_Tensor] = field(default_factory=list)

    def add(self, response: pb.ForwardResponse) -> None:
        """Takes the next message.

        Args:
            response: The header, or a chunk of at most 1 MiB.

        Raises:
            DataLoss: The message is out of order, damaged, or does not fit the request.
        """
        part = response.WhichOneof("part")
        if part == "header" and self._header is None:
            self._header = response.header
            self._check(response.header)
            self._tensors = [_Tensor(t, _buffer(t)) for t in response.header.tensors]
        elif part == "chunk" and response.chunk.tensor in range(len(self._tensors)):
            self._tensors[response.chunk.tensor].take(response.chunk)
        else:
            raise DataLoss(f"an unexpected message came ({part}); call again")

    def scores(self) -> Scores:
        """Gives the scores, once the last message was added.

        Returns:
            The outputs by row. The arrays of one output are views of one buffer.

        Raises:
            DataLoss: The header, a tensor or some bytes are missing.
        """
        if self._header is None:
            raise DataLoss("the answer ended before its header; call again")
        outputs = {tensor.header.name: self._rows(tensor) for tensor in self._tensors}
        header = self._header
        return Scores(
            logprobs=outputs.get("logprobs"),
            logits=outputs.get("logits"),
            handle=header.handle,
            model_id=header.model_id,
            revision=header.revision,
            dtype=header.dtype,
            compute_dtype=header.compute_dtype,
            temperature=header.semantics.temperature,
            head_dtype=header.semantics.head_dtype,
            first_token=header.semantics.first_token,
            queue_seconds=header.queue_time.ToNanoseconds() / 1e9,
            execute_seconds=header.execute_time.ToNanoseconds() / 1e9,
        )

    def _check(self, header: pb.ForwardHeader) -> None:
        wanted = {name for name in OUTPUTS if getattr(self.request.outputs, name)}
        wanted = wanted or {"logprobs"}
        names = [tensor.name for tensor in header.tensors]
        if sorted(names) != sorted(wanted):
            raise DataLoss(f"asked for {sorted(wanted)}, the answer holds {names}")
        if header.handle != self.request.handle:
            raise DataLoss(f"asked model {self.request.handle!r}, {header.handle!r} answered")
        tokens = len(self.request.token_ids)
        for tensor in header.tensors:
            shape = tuple(tensor.shape)
            right = len(shape) == OUTPUTS[tensor.name] and shape[0] == tokens
            if tensor.dtype != "float32" or not right or min(shape) < 0:
                raise DataLoss(
                    f"{tensor.name} is {tensor.dtype} {list(shape)}, not float32 over {tokens} "
                    "tokens"
                )

    def _rows(self, tensor: _Tensor) -> list[NDArray[np.float32]]:
        if tensor.filled != tensor.buffer.size:
            raise DataLoss(
                f"{tensor.header.name} ended after {tensor.filled} of {tensor.buffer.size} bytes; "
                "call again"
            )
        values = tensor.buffer.view("<f4").reshape(tuple(tensor.header.shape))
        ends = np.cumsum(self.request.row_lengths)[:-1]
        return np.split(values.astype(np.float32, copy=False), ends)


def _buffer(header: pb.TensorHeader) -> NDArray[np.uint8]:
    return np.empty(int(np.prod(header.shape, dtype=np.int64)) * 4, np.uint8)
