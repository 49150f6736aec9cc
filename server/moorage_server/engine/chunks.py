"""Questions about many tokens, cut into the chunks that the head takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Int32

from moorage_server.engine.api import Bucket, Question
from moorage_server.engine.head import CHUNK


@dataclass(frozen=True)
class Chunk:
    """As many tokens of a question as the head takes at once, `c` on each of `s` devices.

    Attributes:
        members: Which of the question's tokens they are.
        device: On which device each member is, and
        slot: in which place there. The other places hold what nobody asked for.
        after: The tokens, counted within the rows of each device.
        targets: As in the question.
        temperatures: As in the question; 1 where nothing is asked.
        candidates: As in the question, padded to the profile's size.
    """

    members: Int[np.ndarray, " m"]
    device: Int[np.ndarray, " m"]
    slot: Int[np.ndarray, " m"]
    after: Int32[np.ndarray, "s c"]
    targets: Int32[np.ndarray, "s c"]
    temperatures: Float32[np.ndarray, "s c"]
    candidates: Int32[np.ndarray, "s c n"]

    def put(self, values: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray]) -> None:
        """Copies the head's values `[s, c, ...]` to where the members are in the results."""
        for name, result in results.items():
            result[self.members] = values[name][self.device, self.slot]


def chunks(question: Question, bucket: Bucket, devices: int) -> Iterator[Chunk]:
    """Cuts a question about a batch whose rows lie, in equal runs, on the devices."""
    own = bucket.rows // devices * bucket.length
    device, after = np.divmod(question.after, own)
    order = np.argsort(device, kind="stable")
    firsts = np.searchsorted(device[order], np.arange(devices))
    place = np.empty_like(order)  # which of its device's tokens each is
    place[order] = np.arange(len(order)) - firsts[device[order]]
    number, slot = np.divmod(place, CHUNK)
    for i in range(number.max(initial=-1) + 1):
        members = np.flatnonzero(number == i)
        at = (device[members], slot[members])
        yield _chunk(question, members, at, after[members].astype(np.int32), devices)


def _chunk(
    question: Question,
    members: Int[np.ndarray, " m"],
    at: tuple[np.ndarray, np.ndarray],
    after: Int32[np.ndarray, " m"],
    devices: int,
) -> Chunk:
    indices, targets = np.zeros((2, devices, CHUNK), np.int32)
    temperatures = np.ones((devices, CHUNK), np.float32)
    candidates = np.zeros((devices, CHUNK, question.profile.candidates), np.int32)
    indices[at] = after
    targets[at] = question.targets[members]
    temperatures[at] = question.temperatures[members]
    if question.candidates.size:
        candidates[*at, : question.candidates.shape[1]] = question.candidates[members]
    return Chunk(members, *at, indices, targets, temperatures, candidates)
