"""What each device's memory is promised to. Pure: the cache decides when, this says whether."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moorage_server.engine import Need


class Budget:
    """The reservations of all models.

    One program runs at a time, so the largest temporaries of all are reserved once.

    Attributes:
        capacity: Bytes on each device that models may take.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._needs: dict[str, Need] = {}

    def reserved(self, without: Collection[str] = ()) -> int:
        """Bytes on each device that are promised, some models left out."""
        needs = [need for handle, need in self._needs.items() if handle not in without]
        return _total(needs)

    def weights(self, handle: str) -> int:
        """Bytes on each device that are promised to a model's parameters."""
        need = self._needs.get(handle)
        return need.weights if need else 0

    def promised(self, handle: str) -> int:
        """Bytes on each device that a model would need alone."""
        need = self._needs.get(handle)
        return need.weights + need.temporaries if need else 0

    def fits(self, need: Need, without: Collection[str] = ()) -> bool:
        """Whether a model would fit beside the others, some of them left out."""
        needs = [held for handle, held in self._needs.items() if handle not in without]
        return _total([*needs, need]) <= self.capacity

    def reserve(self, handle: str, need: Need) -> None:
        """Promises memory to a model, which must fit and have none yet."""
        assert handle not in self._needs
        assert self.fits(need)
        self._needs[handle] = need

    def release(self, handle: str) -> None:
        """Takes back what a model was promised, if anything was."""
        self._needs.pop(handle, None)

    def victims(
        self, need: Need, candidates: Sequence[str], leaving: Collection[str] = ()
    ) -> list[str] | None:
        """Which models have to go so that another fits.

        Args:
            need: What the other one takes.
            candidates: Models that may go, the least recently used first.
            leaving: Models that go anyway.

        Returns:
            As few as that order allows; None if it does not fit even without all of them.
        """
        going: list[str] = []
        for handle in candidates:
            if self.fits(need, [*leaving, *going]):
                break
            going.append(handle)
        if not self.fits(need, [*leaving, *going]):
            return None
        for handle in list(going):
            others = [other for other in going if other != handle]
            if self.fits(need, [*leaving, *others]):
                going = others
        return going


def _total(needs: Sequence[Need]) -> int:
    return sum(n.weights for n in needs) + max((n.temporaries for n in needs), default=0)
