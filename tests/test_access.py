"""Tokens: who calls, what each role may do, and what a change of the file does."""

import os

import pytest

from moorage.v1 import moorage_pb2 as pb
from moorage_server.access import METHODS, Access, Caller, Role, role_for
from moorage_server.errors import Reason, ServerError

SCORE, LOAD, ADMIN = "score-token-0123456789", "load-token-0123456789", "admin-token-0123456789"
FILE = f"""
# who      role
eval       score  {SCORE}
grpo-7     load   {LOAD}   # a run
ops        ADMIN  {ADMIN}
"""


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(FILE)
    return path


def refused(access: Access, authorization: str) -> str:
    with pytest.raises(ServerError) as caught:
        access.caller(authorization, "ipv4:1")
    assert caught.value.reason is Reason.UNAUTHENTICATED
    return caught.value.message


def test_without_a_file_everybody_may_do_everything():
    assert Access().caller("", "ipv4:1") == Caller("ipv4:1", Role.ADMIN)


def test_a_token_tells_who_calls(tokens):
    access = Access(tokens)
    assert access.caller(f"Bearer {SCORE}", "x") == Caller("eval", Role.SCORE)
    assert access.caller(f"bearer  {LOAD} ", "x") == Caller("grpo-7", Role.LOAD)
    assert access.caller(f"Bearer {ADMIN}", "x") == Caller("ops", Role.ADMIN)


@pytest.mark.parametrize("given", ["", SCORE, f"Basic {SCORE}", "Bearer"])
def test_without_a_token_it_is_said_how_to_give_one(tokens, given):
    assert "MOORAGE_TOKEN" in refused(Access(tokens), given)


@pytest.mark.parametrize(
    "given", ["Bearer ", f"Bearer {SCORE}x", "Bearer eval", f"Bearer {'é' * 9}"]
)
def test_an_unknown_token_is_not_repeated(tokens, given):
    message = refused(Access(tokens), given)
    assert message == "this server does not know that token"


def test_roles_may_do_what_those_before_them_may():
    loader = Caller("grpo-7", Role.LOAD)
    loader.check(Role.SCORE, "Forward")
    loader.check(Role.LOAD, "LoadModel")
    with pytest.raises(ServerError) as caught:
        loader.check(Role.ADMIN, "unloading")
    assert caught.value.reason is Reason.PERMISSION_DENIED
    assert caught.value.message == (
        "unloading takes a token of role admin; that of 'grpo-7' is of role load"
    )


def test_every_method_has_the_role_of_what_it_changes():
    wanted = {
        service.name + "/" + method.name: role_for(f"/{service.full_name}/{method.name}")
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert {name for name, role in wanted.items() if role is not Role.SCORE} == {
        "ModelService/LoadModel",
        "ModelService/UnloadModel",
        "ModelService/RenewLease",
        "ModelService/ReleaseLease",
    }
    assert role_for("/grpc.health.v1.Health/Check") is Role.SCORE
    assert role_for("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo") is Role.SCORE
    assert role_for("/somebody.else.Service/Method") is Role.ADMIN
    assert all(prefix.startswith("/") for prefix in METHODS)


def test_a_changed_file_counts_from_the_next_call(tokens):
    access = Access(tokens)
    tokens.write_text(f"late load {SCORE}")
    assert access.caller(f"Bearer {SCORE}", "x") == Caller("late", Role.LOAD)
    assert "does not know" in refused(access, f"Bearer {ADMIN}")


@pytest.mark.parametrize("text", ["", "eval score", "eval score short", f"eval boss {SCORE}"])
def test_a_file_that_is_wrong_is_not_taken(tokens, caplog, text):
    access = Access(tokens)
    tokens.write_text(text)
    assert access.caller(f"Bearer {LOAD}", "x").name == "grpo-7"
    assert "what was there before still holds" in caplog.text
    assert SCORE not in caplog.text
    with pytest.raises(ValueError, match=r"tokens: (line 1|there is no token)"):
        Access(tokens)


def test_a_file_that_goes_for_a_moment_is_no_harm(tokens):
    access = Access(tokens)
    os.rename(tokens, tokens.with_name("away"))
    assert access.caller(f"Bearer {LOAD}", "x").name == "grpo-7"
    os.rename(tokens.with_name("away"), tokens)
    assert access.caller(f"Bearer {LOAD}", "x").name == "grpo-7"


def test_a_token_twice_is_refused(tokens):
    tokens.write_text(f"a score {SCORE}\nb admin {SCORE}")
    with pytest.raises(ValueError, match="line 2: this token stands in an earlier line") as caught:
        Access(tokens)
    assert SCORE not in str(caught.value)
