"""Ragged rows to padded batches and back, with a forward pass that shows where values belong."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_double import EngineDouble
from moorage_models.config import ModelConfig
from moorage_models.families import PRESETS
from moorage_server import requests
from moorage_server.engine import Answers, Bucket
from moorage_server.engine.outputs import PROFILES, served
from moorage_server.errors import Reason, ServerError
from moorage_server.requests import Wanted
from moorage_server.rows import check_rows, make_rows
from moorage_server.scoring import Piece, make_work, run_batch, score

NAN = np.nan
CONFIG = ModelConfig(
    family="llama3",
    num_layers=1,
    vocab_size=600,
    embed_dim=8,
    hidden_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
)
BUCKETS = (Bucket(8, 1), Bucket(8, 4), Bucket(16, 2))


def positions(batch, questions):
    """A pass whose value after a token is a hundred times its id, and its position.

    The other values of a token, of the larger tables, are further from it by one each.
    """
    known = (batch.tokens * 100 + batch.positions).reshape(-1)
    return Answers(tuple(_values(known[q.after], q.profile) for q in questions), 1.0, 0.5)


def _values(known, profile):
    def of(tensor):
        width = tensor.width(CONFIG, profile.size)
        return np.add.outer(known, np.arange(*width or (1,))).reshape(len(known), *width)

    tensors = profile.tensors(profile.outputs)
    return {name: of(tensor).astype(tensor.dtype) for name, tensor in tensors.items()}


def work_of(rows, buckets=BUCKETS, config=CONFIG, **wanted):
    return make_work(rows, Wanted(**wanted), config, buckets, served(config))


def run(rows, outputs, forward=positions, buckets=BUCKETS, **wanted):
    """The tensors of one request by itself."""
    work = work_of(rows, buckets, outputs=tuple(outputs), **wanted)
    score(work, buckets, 1, forward)
    work.check()
    return work.tensors


def refused(call, *arguments):
    with pytest.raises(ServerError) as caught:
        call(*arguments)
    return caught.value


# Rows and back.


def test_logprobs_are_about_the_token_they_stand_at():
    rows = make_rows([5, 6, 7, 8, 9], [3, 2], [])
    found = run(rows, ["logprobs"])
    np.testing.assert_array_equal(found["logprobs"], [NAN, 500, 601, NAN, 800])
    assert found["logprobs"].dtype == np.float32


def test_positions_restart_and_nan_stands_at_each_first_token():
    rows = make_rows([5, 6, 7, 8, 9, 3], [5, 1], [1, 1, 2, 2, 3, 1])
    found = run(rows, ["logprobs"])
    np.testing.assert_array_equal(found["logprobs"], [NAN, 500, NAN, 700, NAN, NAN])


def test_logits_stand_after_each_token():
    rows = make_rows([5, 6, 7], [2, 1], [])
    found = run(rows, ["logits", "logprobs"])
    assert found["logits"].shape == (3, 600)
    np.testing.assert_array_equal(found["logits"][:, 0], [500, 601, 700])
    np.testing.assert_array_equal(found["logits"][:, 599], [1099, 1200, 1299])
    np.testing.assert_array_equal(found["logprobs"], [NAN, 500, NAN])


def test_a_batch_is_padded_with_zeros():
    seen = []

    def forward(batch, questions):
        seen.append((batch, questions))
        return positions(batch, questions)

    run(make_rows([5, 6, 7, 4], [3, 1], [1, 2, 2, 1]), ["logits"], forward)
    ((batch, (question,)),) = seen
    assert question.after.tolist() == [0, 1, 2, 8]
    assert question.targets.tolist() == [5, 6, 7, 4]
    assert batch.depth is None
    assert batch.tokens.tolist() == [[5, 6, 7] + [0] * 5, [4] + [0] * 7, [0] * 8, [0] * 8]
    assert batch.segments.tolist() == [[1, 2, 2] + [0] * 5, [1] + [0] * 7, [0] * 8, [0] * 8]
    assert batch.positions.tolist() == [[0, 0, 1] + [0] * 5, [0] * 8, [0] * 8, [0] * 8]


some_buckets = st.sets(
    st.builds(Bucket, length=st.sampled_from([4, 8, 16, 64]), rows=st.sampled_from([1, 2, 4, 8])),
    min_size=1,
).map(sorted)


@st.composite
def rows_and_buckets(draw):
    """Rows as lengths of segments, each no longer than the longest bucket."""
    buckets = draw(some_buckets)
    row = st.lists(st.integers(1, buckets[-1].length), min_size=1, max_size=5)
    fitting = row.filter(lambda segments: sum(segments) <= buckets[-1].length)
    return draw(st.lists(fitting, min_size=1, max_size=9)), buckets


@settings(deadline=None, max_examples=300)
@given(rows_and_buckets())
def test_every_value_returns_to_its_place(case):
    rows, buckets = case
    lengths = [sum(segments) for segments in rows]
    ids = [[number] * size for row in rows for number, size in enumerate(row, 1)]
    expected, token = [], 0
    for size in itertools.chain.from_iterable(rows):
        expected += [NAN] + [100 * (token + i) + i for i in range(size - 1)]
        token += size
    packed = make_rows(range(token), lengths, list(itertools.chain.from_iterable(ids)))
    shapes = []

    def forward(batch, questions):
        shapes.append(Bucket(batch.tokens.shape[1], batch.tokens.shape[0]))
        return positions(batch, questions)

    found = run(packed, ["logprobs"], forward, buckets)
    np.testing.assert_array_equal(found["logprobs"], expected)
    assert set(shapes) <= set(buckets)


# Batches.


def plan_of(lengths, buckets):
    """Which rows run together, and in which bucket: a row's tokens are its number."""
    plan = []

    def forward(batch, questions):
        rows, length = batch.tokens.shape
        real = batch.segments[:, 0] > 0
        plan.append((batch.tokens[real, 0].tolist(), Bucket(length, rows)))
        return positions(batch, questions)

    run(
        make_rows(np.repeat(range(len(lengths)), lengths).tolist(), lengths, []),
        ["hidden"],
        forward,
        buckets,
    )
    return plan


def test_rows_go_to_the_shortest_bucket_that_holds_them():
    assert plan_of([3, 9, 8, 1, 2, 5, 16], BUCKETS) == [
        ([1, 6], Bucket(16, 2)),
        ([0, 2, 3, 4], Bucket(8, 4)),
        ([5], Bucket(8, 1)),
    ]


def test_a_batch_takes_the_fewest_rows_that_hold_it():
    buckets = (Bucket(8, 1), Bucket(8, 2), Bucket(8, 4))
    sizes = {count: [b.rows for _, b in plan_of([8] * count, buckets)] for count in range(1, 10)}
    assert sizes == {
        1: [1],
        2: [2],
        3: [4],
        4: [4],
        5: [4, 1],
        6: [4, 2],
        7: [4, 4],
        8: [4, 4],
        9: [4, 4, 1],
    }


@settings(deadline=None)
@given(st.data(), some_buckets)
def test_every_row_is_in_one_batch_that_holds_it(data, buckets):
    lengths = data.draw(st.lists(st.integers(1, buckets[-1].length), min_size=1, max_size=40))
    plan = plan_of(lengths, buckets)
    assert sorted(row for members, _ in plan for row in members) == list(range(len(lengths)))
    for members, bucket in plan:
        assert bucket in buckets
        assert 1 <= len(members) <= bucket.rows
        assert all(lengths[row] <= bucket.length for row in members)


def test_rows_lie_on_one_device_after_another():
    seen = []

    def forward(batch, questions):
        seen.append((batch.tokens[:, 0].tolist(), questions[0].after.tolist()))
        return positions(batch, questions)

    work = work_of(make_rows([5, 6, 7], [1, 1, 1], []), outputs=("hidden",))
    score(work, (Bucket(8, 4),), 2, forward)
    assert seen == [([5, 7, 6, 0], [0, 16, 8])]
    np.testing.assert_array_equal(work.tensors["hidden"][:, 0], [500, 600, 700])


def test_rows_of_several_requests_run_together():
    """The second asks the same program at another temperature, the third another one."""
    asked = []

    def forward(batch, questions):
        asked.extend((q.profile.name, q.temperatures.tolist()) for q in questions)
        return positions(batch, questions)

    works = [
        work_of(make_rows([1, 2, 3], [3], []), outputs=("logprobs",)),
        work_of(make_rows([4, 5, 6], [1, 2], []), outputs=("logprobs",), temperature=2.0),
        work_of(make_rows([7, 8], [2], []), outputs=("logits",)),
    ]
    pieces = [Piece(works[1], 1), Piece(works[2], 0), Piece(works[0], 0)]
    run_batch(pieces, Bucket(8, 4), 1, forward)
    assert asked == [("logprobs", [2.0, 1.0, 1.0]), ("logits", [1.0, 1.0])]
    np.testing.assert_array_equal(works[0].tensors["logprobs"], [NAN, 100, 201])
    np.testing.assert_array_equal(works[1].tensors["logprobs"], [NAN, NAN, 500])
    np.testing.assert_array_equal(works[2].tensors["logits"][:, 0], [700, 801])
    assert [work.timings.execute for work in works] == [1.0, 1.0, 1.0]
    assert [work.buckets for work in works] == [{Bucket(8, 4)}] * 3


def test_rows_of_which_nothing_can_be_said_are_not_run():
    def forward(batch, questions):
        raise AssertionError("run")

    np.testing.assert_array_equal(
        run(make_rows([5, 6, 7], [1, 2], [1, 1, 2]), ["logprobs"], forward)["logprobs"], [NAN] * 3
    )


# Which tokens, and how wide.


def test_values_from_a_position_on():
    rows = make_rows([1, 2, 3, 4, 5], [3, 2], [])
    work = work_of(rows, outputs=("logprobs", "hidden"), from_positions=(2, 0), first_value=0.0)
    score(work, BUCKETS, 1, positions)
    np.testing.assert_array_equal(work.tensors["logprobs"], [201, 0, 400])
    np.testing.assert_array_equal(work.tensors["hidden"][:, 0], [302, 400, 501])
    assert {name: list(sizes) for name, sizes in work.row_lengths.items()} == {
        "logprobs": [1, 2],
        "hidden": [1, 2],
    }
    np.testing.assert_array_equal(run(rows, ["logprobs"], from_positions=(2,))["logprobs"], [201])


def test_values_at_chosen_positions():
    rows = make_rows([1, 2, 3, 4, 5], [3, 2], [])
    wanted = {"positions": np.array([1, 4], np.int32)}
    found = run(rows, ["logits", "logprobs"], **wanted)
    np.testing.assert_array_equal(found["logits"][:, 0], [201, 501])
    assert found["logprobs"].shape == (5,)  # those are about tokens, not after them


def test_chosen_positions_of_some_outputs_beside_a_first_position_of_others():
    wanted = {"positions": np.array([0], np.int32), "from_positions": (2,)}
    found = run(make_rows([1, 2, 3], [3], []), ["logits", "logprobs"], **wanted)
    np.testing.assert_array_equal(found["logits"][:, 0], [100])
    np.testing.assert_array_equal(found["logprobs"], [201])


def test_a_top_k_is_as_wide_as_was_asked():
    found = run(make_rows([1, 2, 3], [3], []), ["top_k"], top_k=5)
    assert found["top_k_ids"].tolist() == [
        [-1] * 5,
        [100, 101, 102, 103, 104],
        [201, 202, 203, 204, 205],
    ]
    assert found["top_k_logprobs"].shape == (3, 5)
    assert found["top_k_ids"].dtype == np.int32


@pytest.mark.parametrize(("sets", "second"), [([[9, 8]], [9, 8]), ([[0, 0], [9, 8]], [9, 8])])
def test_candidates_are_one_set_for_all_or_one_for_each(sets, second):
    asked = []

    def forward(batch, questions):
        asked.append(questions[0].candidates)
        return positions(batch, questions)

    ids = np.array(sets, np.int32).reshape(-1)
    run(make_rows([1, 2], [2], []), ["candidates"], forward, candidates=ids, candidate_count=2)
    assert asked[0].tolist() == [[*second, 0, 0, 0, 0, 0, 0]]


def test_rows_without_a_wanted_position_have_no_set_of_candidates():
    none = {"candidates": np.zeros(0, np.int32), "candidate_count": 2, "from_positions": (1,)}
    rows = make_rows([1, 2], [1, 1], [])
    assert run(rows, ["candidates"], **none)["candidates"].shape == (0, 2)
    both = run(rows, ["logits", "candidates"], positions=np.arange(2, dtype=np.int32), **none)
    assert (both["logits"][:, 0].tolist(), both["candidates"].shape) == ([100, 200], (0, 2))
    error = refused(lambda: run(make_rows([1, 2], [2], []), ["candidates"], **none))
    assert "there are 0 sets of candidates for 1 wanted positions" in error.message


# What is refused.


@pytest.mark.parametrize(
    ("tokens", "lengths", "segments", "reason", "details"),
    [
        ([], [], [], Reason.ROW_EMPTY, {"row": "0"}),
        ([], [0], [], Reason.ROW_EMPTY, {"row": "0"}),
        ([1, 2], [2, 0], [], Reason.ROW_EMPTY, {"row": "1"}),
        ([1, 2], [3, -1], [], Reason.ROW_EMPTY, {"row": "1"}),
        ([1, 2, 3], [2], [], Reason.INVALID_REQUEST, {}),
        ([1, 2], [2, 1], [], Reason.INVALID_REQUEST, {}),
        ([1], [2**31 - 1], [], Reason.INVALID_REQUEST, {}),
        ([1, 2], [2], [1], Reason.INVALID_REQUEST, {}),
        ([1, 2], [2], [1, 1, 1], Reason.INVALID_REQUEST, {}),
        ([1, 2], [2], [0, 0], Reason.INVALID_REQUEST, {"row": "0"}),
        ([1, 2], [2], [2, 2], Reason.INVALID_REQUEST, {"row": "0"}),
        ([1, 2], [1, 1], [1, 2], Reason.INVALID_REQUEST, {"row": "1"}),
        ([1, 2, 3], [1, 2], [1, 1, 3], Reason.INVALID_REQUEST, {"row": "1"}),
        ([1, 2, 3], [3], [1, 2, 1], Reason.INVALID_REQUEST, {"row": "0"}),
        ([1, 2], [2], [-1, 0], Reason.INVALID_REQUEST, {"row": "0"}),
        ([1, 2], [2], [1, -(2**31)], Reason.INVALID_REQUEST, {"row": "0"}),
    ],
)
def test_rows_that_are_none(tokens, lengths, segments, reason, details):
    error = refused(make_rows, tokens, lengths, segments)
    assert (error.reason, error.details) == (reason, details)


@pytest.mark.parametrize(
    ("rows", "reason", "details"),
    [
        ([[1, 2], [3, -1]], Reason.TOKEN_OUT_OF_RANGE, {"row": "1", "position": "1"}),
        ([[1, 2], [600, -1]], Reason.TOKEN_OUT_OF_RANGE, {"row": "1", "position": "0"}),
        ([[599, 600], [600]], Reason.TOKEN_OUT_OF_RANGE, {"row": "0", "position": "1"}),
        ([[2**31 - 1]], Reason.TOKEN_OUT_OF_RANGE, {"row": "0", "position": "0"}),
        ([[1] * 16, [1] * 17], Reason.SEQUENCE_TOO_LONG, {"row": "1", "limit": "16"}),
    ],
)
def test_rows_that_cannot_be_run(rows, reason, details):
    packed = make_rows(list(itertools.chain(*rows)), [len(row) for row in rows], [])
    error = refused(check_rows, packed, 600, 16)
    assert (error.reason, error.details) == (reason, details)
    assert f"row {details['row']}" in error.message
    assert details.get("limit", "599") in error.message


def test_the_first_and_the_last_token_of_the_vocabulary_are_taken():
    check_rows(make_rows([0, 599], [2], []), 600, 16)


def test_an_answer_over_the_limit(monkeypatch):
    rows = make_rows([1, 2, 3], [3], [])
    size = 3 * 4 * (600 + 1)
    monkeypatch.setattr(requests, "MAX_OUTPUT_BYTES", size)
    assert work_of(rows, outputs=("logits", "logprobs")).nbytes == size
    monkeypatch.setattr(requests, "MAX_OUTPUT_BYTES", size - 1)
    error = refused(lambda: work_of(rows, outputs=("logits", "logprobs")))
    assert (error.reason, error.details) == (Reason.OUTPUT_TOO_LARGE, {"limit": str(size - 1)})
    assert str(size) in error.message
    work_of(rows, outputs=("logits",))
    work_of(rows, outputs=("logits", "logprobs"), from_positions=(1,))


@pytest.mark.parametrize(
    ("wanted", "described"),
    [
        ({"outputs": ("logprobs", "score")}, "logprobs, score is not served"),
        ({"outputs": ("top_k",), "top_k": 129}, "top_k 129 is not served"),
    ],
)
def test_outputs_that_a_model_does_not_have(wanted, described):
    error = refused(lambda: work_of(make_rows([1], [1], []), **wanted))
    assert error.reason is Reason.OUTPUT_NOT_SERVED
    assert error.message.startswith(described)
    names = [p.name for p in PROFILES if p.name != "score"]
    assert error.message.endswith("programs of this model are: " + ", ".join(names))


def test_a_model_that_gives_scores_has_no_logprobs():
    rows = make_rows([1], [1], [])
    rewarding = ModelConfig(**{**vars(CONFIG), "num_labels": 1})
    assert work_of(rows, config=rewarding, outputs=("score",)).tensors["score"].shape == (1, 1)
    error = refused(lambda: work_of(rows, config=rewarding, outputs=("logprobs",)))
    assert error.reason is Reason.OUTPUT_NOT_SERVED
    assert error.message.endswith("programs of this model are: score, hidden")


IDS = np.arange(4, dtype=np.int32)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"outputs": ("logprobs",), "temperature": 0.0}, "temperature is 0.0; give"),
        ({"outputs": ("logprobs",), "temperature": -1.0}, "temperature is -1.0; give"),
        ({"outputs": ("logprobs",), "temperature": 1e-31}, "from 1e-30 on"),
        ({"outputs": ("logprobs",), "temperature": NAN}, "temperature is nan; give"),
        ({"outputs": ("logprobs",), "temperature": np.inf}, "temperature is inf; give"),
        ({"outputs": ("top_k",)}, "top_k is 0"),
        ({"outputs": ("top_k",), "top_k": 601}, "give 1 to 600"),
        ({"outputs": ("logprobs",), "top_k": 5}, "top_k is 5"),
        ({"outputs": ("candidates",)}, "0 candidates in sets of 0"),
        ({"outputs": ("candidates",), "candidates": IDS}, "4 candidates in sets of 0"),
        (
            {"outputs": ("candidates",), "candidates": IDS, "candidate_count": 3},
            "4 candidates in sets of 3",
        ),
        (
            {"outputs": ("candidates",), "candidates": IDS, "candidate_count": 2},
            "2 sets of candidates for 3 wanted positions",
        ),
        (
            {"outputs": ("candidates",), "candidates": IDS + 597, "candidate_count": 4},
            "none of the tokens 0 to 599",
        ),
        (
            {"outputs": ("candidates",), "candidates": IDS - 1, "candidate_count": 4},
            "none of the tokens 0 to 599",
        ),
        ({"outputs": ("logprobs",), "candidates": IDS, "candidate_count": 4}, "leave them out"),
        ({"outputs": ("hidden",), "layer": 2}, "layer 2 is none of 0 to 1"),
        ({"outputs": ("hidden",), "layer": -1}, "layer -1 is none of 0 to 1"),
        ({"outputs": ("hidden", "logprobs"), "layer": 1}, "ask for it alone"),
        ({"outputs": ("logits",), "layer": 1}, "ask for it alone"),
        ({"outputs": ("logits",), "from_positions": (1, 2)}, "2 for 1 rows"),
        ({"outputs": ("logits",), "from_positions": (-1,)}, "none below 0"),
        ({"outputs": ("logits",), "positions": np.array([0, 3], np.int32)}, "from 0 to 2"),
        ({"outputs": ("logits",), "positions": np.array([1, 1], np.int32)}, "rising order"),
        ({"outputs": ("logits",), "positions": np.array([-1], np.int32)}, "rising order"),
        ({"outputs": ("logprobs",), "positions": IDS[:3]}, "none is asked for: leave them out"),
        (
            {"outputs": ("top_k", "entropy"), "top_k": 2, "positions": IDS[:1]},
            "or give from_positions",
        ),
        (
            {"outputs": ("hidden",), "positions": IDS[:1], "from_positions": (1,)},
            "from_positions are given beside positions",
        ),
    ],
    ids=str,
)
def test_what_contradicts_itself(wanted, problem):
    error = refused(lambda: work_of(make_rows([1, 2, 3], [3], []), **wanted))
    assert error.reason is Reason.INVALID_REQUEST
    assert problem in error.message


@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("output", "token", "row"),
    [
        ("logprobs", 0, "0"),
        ("logprobs", 1, None),  # after the last token of row 0: about nothing
        ("logprobs", 2, None),  # after the last token of a segment
        ("logprobs", 3, "1"),
        ("logits", 1, "0"),
        ("logits", 4, "1"),
    ],
)
def test_what_is_not_finite_is_never_given(output, token, row, value):
    rows = make_rows([5, 6, 7, 8, 9], [2, 3], [1, 1, 1, 2, 2])
    asked = []

    def forward(batch, questions):
        answers = positions(batch, questions)
        after = batch.tokens.reshape(-1)[questions[0].after]
        asked.extend(after)
        answers.tensors[0][output][after == 5 + token] = value
        return answers

    if row is None:
        found = run(rows, [output], forward)
        np.testing.assert_array_equal(found[output], [NAN, 500, NAN, NAN, 800])
        assert 5 + token not in asked
    else:
        error = refused(run, rows, [output], forward)
        assert (error.reason, error.details) == (Reason.NON_FINITE_OUTPUT, {"rows": row})
        assert f"outputs of 1 rows are not finite: {row}." in error.message


def test_one_number_among_the_logits_is_enough():
    def forward(batch, questions):
        answers = positions(batch, questions)
        answers.tensors[0]["logits"][0, 17] = NAN
        return answers

    error = refused(run, make_rows([5], [1], []), ["logits"], forward)
    assert error.reason is Reason.NON_FINITE_OUTPUT


def test_what_was_padded_up_is_not_looked_at():
    """A program's top-k is wider than what was asked for."""

    def forward(batch, questions):
        answers = positions(batch, questions)
        answers.tensors[0]["top_k_logprobs"][:, 5:] = NAN
        return answers

    run(make_rows([5, 6], [2], []), ["top_k"], forward, top_k=5)
    error = refused(lambda: run(make_rows([5, 6], [2], []), ["top_k"], forward, top_k=6))
    assert error.reason is Reason.NON_FINITE_OUTPUT


def test_a_bucket_set_serves_a_model_up_to_its_context():
    info = EngineDouble().info()
    assert [(b.rows, b.length) for b in info.buckets_for(100)] == [(1, 128), (4, 128)]
    assert [(b.rows, b.length) for b in info.buckets_for(128)] == [(1, 128), (4, 128)]
    assert [(b.rows, b.length) for b in info.buckets_for(129)] == [(1, 128), (4, 128), (1, 512)]
    longest = PRESETS["llama3p1_8b"].max_position
    assert [(b.rows, b.length) for b in info.buckets_for(longest)][-1] == (1, 512)
