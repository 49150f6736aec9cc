"""Limits: what is one too many is refused, with the limit's name; what ends makes room."""

from contextlib import ExitStack

import pytest

from moorage_server.errors import Reason, ServerError
from moorage_server.limits import Gate, Limits


def refusal(gate: Gate, client: str) -> ServerError:
    with pytest.raises(ServerError) as caught, gate.passing(client):
        pass
    return caught.value


def test_a_client_may_have_no_more_requests_under_way_than_its_limit():
    gate = Gate(Limits(client_requests=2))
    with gate.passing("a"), gate.passing("a"), gate.passing("b"):
        error = refusal(gate, "a")
        assert error.reason is Reason.LIMIT_EXCEEDED
        assert error.details == {"limit": "max_client_requests", "value": "2"}
        assert error.retry_after == 1.0
        assert "2 requests of this client and 1 more are over max_client_requests, 2" in str(error)
        with gate.passing("b"):
            assert gate.requests == 4
    with gate.passing("a"):
        assert gate.requests == 1


def test_all_clients_together_may_have_no_more_than_theirs():
    gate = Gate(Limits(requests=3))
    with ExitStack() as stack:
        for client in "abc":
            stack.enter_context(gate.passing(client))
        assert refusal(gate, "d").details["limit"] == "max_requests"
    assert gate.requests == 0


def test_a_request_that_fails_makes_room():
    gate = Gate(Limits(requests=1, client_requests=1))
    for _ in range(3):
        with pytest.raises(KeyError), gate.passing("a"):
            raise KeyError
    assert gate.requests == 0
