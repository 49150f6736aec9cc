"""The states of a model: which may follow which, exhaustively, and what the wire calls them."""

import itertools

import pytest

from checkpoints import GOLDEN, open_folder
from moorage.v1 import moorage_pb2 as pb
from moorage_server.lifecycle import NEXT, OVER, State
from moorage_server.model import Model

CHECKPOINT = open_folder(GOLDEN / "llama3")
FOLLOWS = {
    "RESOLVING": "QUEUED FAILED CANCELLED",
    "QUEUED": "LOADING FAILED CANCELLED",
    "LOADING": "READY FAILED CANCELLED",
    "READY": "DRAINING",
    "DRAINING": "UNLOADED",
    "UNLOADED": "",
    "FAILED": "",
    "CANCELLED": "",
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(FOLLOWS, FOLLOWS)))
def test_a_state_is_followed_by_what_the_table_says(before, after):
    seen = []
    model = Model("h", CHECKPOINT, seen.append, State(before))
    if after in FOLLOWS[before].split():
        model.enter(State(after))
        assert seen == [model]
        assert list(model.history) == [before, after]
    else:
        with pytest.raises(AssertionError, match=f"{before} is not followed by {after}"):
            model.enter(State(after))
        assert (model.state, seen) == (before, [])


def test_the_table_has_every_state_and_the_wire_too():
    assert set(NEXT) == set(State) == set(FOLLOWS)
    assert {f"MODEL_STATE_{state}" for state in State} == set(pb.ModelState.keys()) - {
        "MODEL_STATE_UNSPECIFIED"
    }
    assert set(OVER) == {"UNLOADED", "FAILED", "CANCELLED"}


def test_every_state_can_end():
    for state in State:
        reached = {state}
        while more := {after for before in reached for after in NEXT[before]} - reached:
            reached |= more
        assert reached & OVER
