"""Ragged rows to padded batches and back, with a forward pass that shows where values belong."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_double import EngineDouble
from moorage_models.config import ModelConfig
from moorage_models.families import PRESETS
from moorage_server import scoring
from moorage_server.engine import Bucket
from moorage_server.errors import Reason, ServerError
from moorage_server.scoring import check_rows, make_rows, plan_batches, score

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


def positions(batch, outputs):
    """A pass whose value after a token is a hundred times its id, and its position."""
    values = [
        batch.tokens[row, :length] * 100 + batch.positions[row, :length]
        for row, length in enumerate(batch.lengths)
    ]
    flat = np.concatenate(values).astype(np.float32)
    found = {"logprobs": flat, "logits": np.repeat(flat[:, None], CONFIG.vocab_size, axis=1)}
    return {name: found[name] for name in outputs}


def refused(call, *arguments):
    with pytest.raises(ServerError) as caught:
        call(*arguments)
    return caught.value


# Rows and back.


def test_logprobs_are_about_the_token_they_stand_at():
    rows = make_rows([5, 6, 7, 8, 9], [3, 2], [])
    found = score(rows, CONFIG, ["logprobs"], BUCKETS, positions)
    np.testing.assert_array_equal(found["logprobs"], [NAN, 500, 601, NAN, 800])
    assert found["logprobs"].dtype == np.float32


def test_positions_restart_and_nan_stands_at_each_first_token():
    rows = make_rows([5, 6, 7, 8, 9, 3], [5, 1], [1, 1, 2, 2, 3, 1])
    found = score(rows, CONFIG, ["logprobs"], BUCKETS, positions)
    np.testing.assert_array_equal(found["logprobs"], [NAN, 500, NAN, 700, NAN, NAN])


def test_logits_stand_after_each_token():
    rows = make_rows([5, 6, 7], [2, 1], [])
    found = score(rows, CONFIG, ["logits", "logprobs"], BUCKETS, positions)
    assert found["logits"].shape == (3, 600)
    np.testing.assert_array_equal(found["logits"][:, 599], [500, 601, 700])
    np.testing.assert_array_equal(found["logprobs"], [NAN, 500, NAN])


def test_a_batch_is_padded_with_zeros():
    seen = []

    def forward(batch, outputs):
        seen.append(batch)
        return positions(batch, outputs)

    score(make_rows([5, 6, 7, 4], [3, 1], [1, 2, 2, 1]), CONFIG, ["logprobs"], BUCKETS, forward)
    (batch,) = seen
    assert batch.lengths == (3, 1)
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

    def forward(batch, outputs):
        shapes.append(Bucket(batch.tokens.shape[1], batch.tokens.shape[0]))
        assert len(batch.lengths) <= len(batch.tokens)
        return positions(batch, outputs)

    found = score(packed, CONFIG, ["logprobs"], buckets, forward)
    np.testing.assert_array_equal(found["logprobs"], expected)
    assert set(shapes) <= set(buckets)


# Batches.


def test_rows_go_to_the_shortest_bucket_that_holds_them():
    plan = list(plan_batches([3, 9, 8, 1, 2, 5, 16], BUCKETS))
    assert plan == [
        ([1, 6], Bucket(16, 2)),
        ([0, 2, 3, 4], Bucket(8, 4)),
        ([5], Bucket(8, 1)),
    ]


def test_a_batch_takes_the_fewest_rows_that_hold_it():
    buckets = (Bucket(8, 1), Bucket(8, 2), Bucket(8, 4))
    sizes = {
        count: [b.rows for _, b in plan_batches([8] * count, buckets)] for count in range(1, 10)
    }
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
    plan = list(plan_batches(lengths, buckets))
    assert sorted(row for members, _ in plan for row in members) == list(range(len(lengths)))
    for members, bucket in plan:
        assert bucket in buckets
        assert 1 <= len(members) <= bucket.rows
        assert all(lengths[row] <= bucket.length for row in members)


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
    error = refused(check_rows, packed, CONFIG, ["logprobs"], BUCKETS)
    assert (error.reason, error.details) == (reason, details)
    assert f"row {details['row']}" in error.message
    assert details.get("limit", "599") in error.message


def test_the_first_and_the_last_token_of_the_vocabulary_are_taken():
    check_rows(make_rows([0, 599], [2], []), CONFIG, ["logprobs", "logits"], BUCKETS)


def test_an_answer_over_the_limit(monkeypatch):
    rows = make_rows([1, 2, 3], [3], [])
    size = 3 * 4 * (600 + 1)
    monkeypatch.setattr(scoring, "MAX_OUTPUT_BYTES", size)
    check_rows(rows, CONFIG, ["logits", "logprobs"], BUCKETS)
    monkeypatch.setattr(scoring, "MAX_OUTPUT_BYTES", size - 1)
    error = refused(check_rows, rows, CONFIG, ["logits", "logprobs"], BUCKETS)
    assert (error.reason, error.details) == (Reason.OUTPUT_TOO_LARGE, {"limit": str(size - 1)})
    assert str(size) in error.message
    check_rows(rows, CONFIG, ["logits"], BUCKETS)


def test_outputs_that_a_model_does_not_have():
    rows = make_rows([1], [1], [])
    error = refused(check_rows, rows, CONFIG, ["logprobs", "entropy"], BUCKETS)
    assert error.reason is Reason.OUTPUT_NOT_SERVED
    assert error.message == "this model does not serve entropy; it serves logprobs, logits"


def test_a_model_that_gives_scores_has_no_logprobs():
    rows = make_rows([1], [1], [])
    rewarding = ModelConfig(**{**vars(CONFIG), "num_labels": 1})
    check_rows(rows, rewarding, ["logits"], BUCKETS)
    error = refused(check_rows, rows, rewarding, ["logprobs"], BUCKETS)
    assert error.reason is Reason.OUTPUT_NOT_SERVED


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

    def forward(batch, outputs):
        values = positions(batch, outputs)
        values[output][positions(batch, ["logprobs"])["logprobs"] // 100 == 5 + token] = value
        return values

    if row is None:
        found = score(rows, CONFIG, [output], BUCKETS, forward)
        np.testing.assert_array_equal(found[output], [NAN, 500, NAN, NAN, 800])
    else:
        error = refused(score, rows, CONFIG, [output], BUCKETS, forward)
        assert (error.reason, error.details) == (Reason.NON_FINITE_OUTPUT, {"row": row})
        assert f"{output} of row {row}" in error.message


def test_one_number_among_the_logits_is_enough():
    def forward(batch, outputs):
        values = positions(batch, outputs)
        values["logits"][0, 17] = NAN
        return values

    rows = make_rows([5], [1], [])
    error = refused(score, rows, CONFIG, ["logits"], BUCKETS, forward)
    assert error.reason is Reason.NON_FINITE_OUTPUT


def test_a_bucket_set_serves_a_model_up_to_its_context():
    info = EngineDouble().info()
    assert [(b.rows, b.length) for b in info.buckets_for(100)] == [(1, 128), (4, 128)]
    assert [(b.rows, b.length) for b in info.buckets_for(128)] == [(1, 128), (4, 128)]
    assert [(b.rows, b.length) for b in info.buckets_for(129)] == [(1, 128), (4, 128), (1, 512)]
    longest = PRESETS["llama3p1_8b"].max_position
    assert [(b.rows, b.length) for b in info.buckets_for(longest)][-1] == (1, 512)
