"""The states of a model, and which may follow which: all there is to know, as data."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """How far a model has come; names as in the wire's `ModelState`."""

    RESOLVING = "RESOLVING"
    QUEUED = "QUEUED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


#: What may come after each state. RESOLVING has no handle yet: it is a look into the source.
NEXT: Mapping[State, frozenset[State]] = {
    State.RESOLVING: frozenset({State.QUEUED, State.FAILED, State.CANCELLED}),
    State.QUEUED: frozenset({State.LOADING, State.FAILED, State.CANCELLED}),
    State.LOADING: frozenset({State.READY, State.FAILED, State.CANCELLED}),
    State.READY: frozenset({State.DRAINING}),
    State.DRAINING: frozenset({State.UNLOADED}),
    State.UNLOADED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

#: States in which a model is in nobody's way: it holds no memory, and its handle is free.
OVER = frozenset(state for state, following in NEXT.items() if not following)
