"""Forward passes as requests: what is packed, what is refused, what is split."""

import math

import numpy as np
import pytest

import moorage
from moorage import batch, packing
from moorage.v1 import moorage_pb2 as pb

ROWS = [[2, 651, 5277], [2, 1841]]


def several(*arguments, **options) -> list[pb.ForwardRequest]:
    """The requests of a pass."""
    return [part.request() for part in batch.make(*arguments, **options).parts]


def one(rows=ROWS, outputs=("logprobs",), segment_ids=None, **options) -> pb.ForwardRequest:
    """The only request of a pass."""
    (request,) = several("a1b2", rows, outputs, segment_ids, **options)
    return request


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [3, 4]],
        ((1, 2), (3, 4)),
        np.array([[1, 2], [3, 4]], np.uint16),
        [np.array([1, 2]), np.array([3, 4], np.int32)],
        np.array([[1, 2, 0], [3, 4, 0]])[:, :2],
        (row for row in ([1, 2], [3, 4])),
    ],
)
def test_rows_are_packed(rows):
    request = one(rows)
    assert (list(request.token_ids), list(request.row_lengths)) == ([1, 2, 3, 4], [2, 2])


def test_segment_ids_are_packed_like_rows():
    assert list(one(segment_ids=[[1, 1, 2], [1, 1]]).segment_ids) == [1, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("outputs", "options", "names"),
    [
        ("logits", {}, ["logits"]),
        (("hidden", "made_later"), {}, ["hidden", "made_later"]),
        (["logprobs", "logprobs"], {}, ["logprobs"]),
        ((), {}, []),
        ((), {"top_k": 3}, ["top_k"]),
        (["top_k", "logprobs"], {"top_k": 3}, ["top_k", "logprobs"]),
        (["logprobs"], {"candidates": [5], "top_k": 1}, ["logprobs", "top_k", "candidates"]),
    ],
)
def test_outputs_go_by_name(outputs, options, names):
    assert list(one(outputs=outputs, **options).outputs.names) == names


def test_options_are_sent():
    request = one(
        outputs="hidden",
        top_k=7,
        layer=0,
        temperature=0.5,
        logit_scale="scaled",
        first_token="zero",
        expected_weights_version=3,
    )
    assert request.outputs.top_k == 7
    assert request.outputs.HasField("layer")
    assert request.semantics == pb.Semantics(
        temperature=0.5, logit_scale=pb.LOGIT_SCALE_SCALED, first_token=pb.FIRST_TOKEN_ZERO
    )
    assert request.expected_weights_version == 3
    assert not one().outputs.HasField("layer")
    assert one().expected_weights_version == 0


def test_every_request_has_an_id_of_its_own():
    assert len({one().request_id for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("from_position", "sent"),
    [(0, []), (1, [1, 1]), ([2, 0], [2, 0]), (np.int64(1), [1, 1]), (np.array([0, 1]), [0, 1])],
)
def test_the_first_position_is_one_or_one_for_each_row(from_position, sent):
    assert list(one(from_position=from_position).from_positions) == sent


def test_positions_are_indices_into_all_tokens():
    assert list(one(positions=[[0, -1], [-1]]).outputs.positions) == [0, 2, 4]


@pytest.mark.parametrize("ids", [[7, 8], (7, 8), np.array([7, 8]), (i for i in (7, 8))])
def test_candidates_for_all_positions(ids):
    assert one(candidates=ids).outputs.candidates == pb.Candidates(ids=[7, 8])


@pytest.mark.parametrize("kind", [list, np.array])
def test_candidates_for_each_position(kind):
    sets = [kind([[1, 2], [3, 256]]), kind([[5, 6]])]
    request = one(candidates=sets, from_position=1)
    assert request.outputs.candidates == pb.Candidates(
        ids_by_position=bytes.fromhex("01000000 02000000 03000000 00010000 05000000 06000000"),
        count=2,
    )


def test_candidates_for_each_position_as_one_array():
    sets = np.arange(8).reshape(2, 2, 2)
    request = one([[1, 2], [3, 4]], candidates=sets)
    found = np.frombuffer(request.outputs.candidates.ids_by_position, "<i4")
    np.testing.assert_array_equal(found, np.arange(8))


def test_a_row_that_ends_before_its_first_position_has_a_table_without_lines():
    sets = [np.array([[5, 6], [7, 8]]), np.zeros((0, 2), int)]
    candidates = one([[1, 2, 3], [4]], candidates=sets, from_position=1).outputs.candidates
    assert np.frombuffer(candidates.ids_by_position, "<i4").tolist() == [5, 6, 7, 8]
    alone = one([[4]], candidates=sets[1:], from_position=1).outputs.candidates
    assert (alone.ids_by_position, alone.count) == (b"", 2)


WRONG = [
    ({"segment_ids": [[1, 1], [1, 1, 1]]}, "one id for each token"),
    ({"segment_ids": [[1, 1, 1]]}, "segment_ids is for 1 rows; there are 2"),
    ({"from_position": -1}, "positions count from 0"),
    ({"from_position": [0]}, "1 values; there are 2 rows"),
    ({"from_position": 0.5}, "from_position must be an integer, not one float"),
    ({"from_position": True}, "not one bool"),
    ({"positions": [[0, 3], [0]]}, r"positions\[0\] is \[0, 3\].* 3 tokens of row 0"),
    ({"positions": [[0], [-3]]}, r"positions\[1\]"),
    ({"positions": [[1, 0], [0]]}, "rising"),
    ({"positions": [[1, -2], [0]]}, "rising"),
    ({"positions": [[1], []]}, r"positions\[1\] is empty"),
    ({"positions": [[1]]}, "positions is for 1 rows; there are 2"),
    ({"candidates": []}, "candidates is empty"),
    ({"candidates": 5}, "candidates must be a list"),
    ({"candidates": [1.5]}, "candidates must be a flat row"),
    ({"candidates": np.zeros((2, 3, 0), int)}, r"candidates\[0\] is empty"),
    ({"candidates": np.zeros((2, 0, 3), int)}, r"for 0 positions; row 0 has 3"),
    ({"candidates": [[1], [2]]}, r"candidates\[0\] must be a table"),
    ({"candidates": [[[1], [2]], [[3], [4]]]}, r"for 2 positions; row 0 has 3"),
    ({"candidates": [[[1]] * 3, [[1, 2]] * 2]}, r"lines of \[1, 2\] tokens"),
    ({"candidates": [[[1], [2, 3], [4]], [[1], [2]]]}, r"candidates\[0\]"),
    ({"candidates": [2**31]}, "32-bit"),
    ({"temperature": 0}, "temperature is 0; give a float32 above 0"),
    ({"temperature": 1e-50}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": "1"}, "wrong kind"),
    ({"timeout": "5"}, "timeout is '5'; give seconds"),
    ({"timeout": math.nan}, "timeout is nan"),
    ({"timeout": True}, "timeout is True"),
    ({"first_token": "none"}, "first_token is 'none'; known are nan, zero"),
    ({"logit_scale": "unspecified"}, "logit_scale is 'unspecified'; known are raw, scaled"),
    ({"first_token": ["nan"]}, "known are nan, zero"),
    ({"top_k": "3"}, "wrong kind"),
    ({"top_k": 2**31}, "wrong kind"),
    ({"layer": 1.5}, "wrong kind"),
    ({"outputs": [5]}, "wrong kind"),
    ({"outputs": None}, "wrong kind"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(moorage.InvalidRequest, match=message):
        one(**options)


@pytest.mark.parametrize("timeout", [9e9, 1e300, math.inf, None])
def test_what_is_longer_than_grpc_counts_is_any_time(timeout):
    assert math.isinf(batch.make("h", [[1, 2]], ["logprobs"], None, timeout=timeout).deadline)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="top_q"):
        one(top_q=1)


# Splitting.


@pytest.fixture
def small(monkeypatch):
    """Requests of at most ten tokens."""
    monkeypatch.setattr(packing, "MAX_TOKENS", 10)
    monkeypatch.setattr(packing, "ROW_TOKENS", 1)


def test_rows_that_do_not_fit_go_into_several_requests(small):
    rows = [np.arange(n) + 10 * n for n in (6, 4, 1, 12, 9, 1)]
    starts = [0, 1, 0, 1, 0, 0]
    requests = several(
        "a1b2",
        rows,
        "hidden",
        [[1] * len(row) for row in rows],
        positions=[[0, -1] if len(row) > 1 else [0] for row in rows],
        candidates=[
            np.full((len(row) - start, 2), i)
            for i, (row, start) in enumerate(zip(rows, starts, strict=True))
        ],
        from_position=starts,
        timeout=5,
    )
    assert [list(r.row_lengths) for r in requests] == [[6, 4], [1], [12], [9, 1]]
    assert [list(r.from_positions) for r in requests] == [[0, 1], [], [1], []]
    assert [list(r.outputs.positions) for r in requests] == [[0, 5, 6, 9], [0], [0, 11], [0, 8, 9]]
    packed = [token for r in requests for token in r.token_ids]
    assert packed == [token for row in rows for token in row]
    assert [len(r.segment_ids) for r in requests] == [10, 1, 12, 10]
    sets = [np.frombuffer(r.outputs.candidates.ids_by_position, "<i4") for r in requests]
    assert [values.tolist() for values in sets] == [
        [0] * 12 + [1] * 6,
        [2] * 2,
        [3] * 22,
        [4] * 18 + [5] * 2,
    ]
    assert len({r.request_id for r in requests}) == 4
    for request in requests:
        assert list(request.outputs.names) == ["hidden", "candidates"]


def test_a_part_is_cut_in_two_with_all_that_is_given_for_its_rows():
    rows = [[1, 2, 3], [4, 5], [6, 7]]
    (part,) = batch.make(
        "a1b2",
        rows,
        ["hidden", "logprobs"],
        [[1, 1, 2], [1, 1], [1, 2]],
        positions=[[0, -1], [1], [-2]],
        candidates=[[[8], [9]], [[10]], [[11], [12]]],
        from_position=[1, 1, 0],
    ).parts
    refusal = moorage.InvalidRequest("too large", reason="OUTPUT_TOO_LARGE")
    first, rest = part.halves(refusal)
    one, other = first.request(), rest.request()
    assert (list(one.token_ids), list(other.token_ids)) == ([1, 2, 3], [4, 5, 6, 7])
    assert (list(one.segment_ids), list(other.segment_ids)) == ([1, 1, 2], [1, 1, 1, 2])
    assert (list(one.from_positions), list(other.from_positions)) == ([1], [1, 0])
    assert (list(one.outputs.positions), list(other.outputs.positions)) == ([0, 2], [1, 2])
    sets = [np.frombuffer(r.outputs.candidates.ids_by_position, "<i4") for r in (one, other)]
    assert [values.tolist() for values in sets] == [[8, 9], [10, 11, 12]]
    assert len({r.request_id for r in (part.request(), one, other)}) == 3
    with pytest.raises(moorage.InvalidRequest, match="too large"):
        first.halves(refusal)
    with pytest.raises(moorage.NotFound):
        part.halves(moorage.NotFound("gone"))


def test_what_is_given_may_change_once_the_pass_has_begun():
    rows = np.array([[1, 2], [3, 4]], np.int32)
    (part,) = batch.make("a1b2", rows, (), None).parts
    rows[:] = 9
    assert list(part.request().token_ids) == [1, 2, 3, 4]


@pytest.mark.parametrize("rows", [300, 3])
def test_no_request_is_larger_than_3_mib_whatever_it_holds(rows):
    """Negative ids are the longest varints, and are the server's to refuse."""
    tokens = [np.full(200_000 // rows, -1)] * rows
    requests = several(
        "h" * 64,
        tokens,
        "hidden",
        [np.full(row.size, 2**31 - 1) for row in tokens],
        positions=[np.arange(row.size) for row in tokens],
        candidates=[100_000] * 10_000,
    )
    assert sum(len(r.row_lengths) for r in requests) == rows
    sizes = [r.ByteSize() for r in requests]
    assert max(sizes) <= 3 << 20
    assert sum(sizes) > 3 << 20


def test_a_request_has_at_most_128_ki_tokens():
    requests = several("a1b2", [[1] * 1000] * 300, "logprobs", None)
    assert [len(r.row_lengths) for r in requests] == [131, 131, 38]


def test_short_rows_count_as_a_server_pads_them():
    """It bounds what waits, padding included: of more it would never have room for one request."""
    requests = several("a1b2", [[1, 2, 3]] * 9000, "logprobs", None)
    assert [len(r.row_lengths) for r in requests] == [1024] * 8 + [808]


def test_candidates_count_towards_the_size_of_a_request():
    rows, sets = [[1] * 1000] * 4, [np.ones((1000, 512), int)] * 4
    requests = several("a1b2", rows, (), None, candidates=sets)
    assert [len(r.row_lengths) for r in requests] == [1, 1, 1, 1]
    assert all(1 << 20 < r.ByteSize() < 3 << 20 for r in requests)


@pytest.mark.parametrize("from_position", [0, 500])
def test_a_row_that_does_not_fit_says_what_would(from_position):
    wanted = 2000 - from_position
    sets = [np.ones((1, 1024), int), np.ones((wanted, 1024), int)]
    with pytest.raises(moorage.MessageTooLarge) as caught:
        one([[1], [1] * 2000], (), candidates=sets, from_position=[0, from_position])
    text = f"row 1 of 2000 tokens with 1024 candidates at each of {wanted} positions does not fit"
    assert text in caught.value.message
    most = int(caught.value.message.split("; ")[1].split()[0])
    fitting = [np.ones((1, most), int), sets[1][:, :most]]
    requests = several(
        "a1b2", [[1], [1] * 2000], (), None, candidates=fitting, from_position=[0, from_position]
    )
    assert max(r.ByteSize() for r in requests) <= 3 << 20
    assert most > 3 * 2**20 / 4 / wanted * 0.9


@pytest.mark.parametrize("candidates", [None, [np.ones((0, 2), int)] * 2])
def test_a_row_of_tokens_that_does_not_fit_says_so(candidates):
    with pytest.raises(moorage.MessageTooLarge, match="row 1 of 200000 tokens does not fit"):
        one([[1], [1] * 200_000], from_position=200_000, candidates=candidates)
