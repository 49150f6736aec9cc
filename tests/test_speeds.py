"""What batches say of the next ones."""

from __future__ import annotations

import pytest

from moorage_server.engine import Bucket
from moorage_server.speeds import FRESH_SECONDS, Speeds

ONE, FOUR = Bucket(128, 1), Bucket(128, 4)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_nothing_is_known_at_first():
    speeds = Speeds(Clock())
    assert (speeds.pace, speeds.seconds("m", ONE)) == (0.0, None)
    assert speeds.least_seconds("m", 128, 0) is None


def test_each_bucket_of_each_model_is_by_itself():
    speeds = Speeds(Clock())
    speeds.note("m", ONE, 128, 0.1)
    speeds.note("m", FOUR, 256, 0.2)
    assert speeds.seconds("m", ONE) == pytest.approx(0.1)
    assert speeds.seconds("m", FOUR) == pytest.approx(0.2)
    assert speeds.seconds("n", ONE) is None


def test_one_slow_batch_weighs_a_fifth():
    speeds = Speeds(Clock())
    speeds.note("m", ONE, 128, 0.1)
    speeds.note("m", ONE, 128, 1e9)
    assert speeds.seconds("m", ONE) == pytest.approx(0.1 / 0.8)


def test_what_was_measured_long_ago_is_tried_again():
    clock = Clock()
    speeds = Speeds(clock)
    speeds.note("m", ONE, 128, 0.1)
    clock.seconds = FRESH_SECONDS
    assert speeds.seconds("m", ONE) == pytest.approx(0.1)
    clock.seconds += 0.1
    assert speeds.seconds("m", ONE) is None
    assert speeds.least_seconds("m", 128, 0) is None  # else nothing might ever run again
    speeds.note("m", ONE, 128, 0.1)
    assert speeds.seconds("m", ONE) == pytest.approx(0.1)
    assert speeds.least_seconds("m", 128, 0) == pytest.approx(0.1)


def test_models_that_are_gone_leave_nothing_behind():
    clock = Clock()
    speeds = Speeds(clock)
    for number in range(1000):
        clock.seconds += 1.0
        speeds.note(f"m{number}", ONE, 128, 0.1)
    assert len(speeds._speeds) <= FRESH_SECONDS + 1


def test_the_pace_counts_rows_and_speeds_count_places():
    speeds = Speeds(Clock())
    speeds.note("m", FOUR, 128, 0.1)
    assert speeds.pace == pytest.approx(1280)
    assert speeds.least_seconds("m", 512, 0) == pytest.approx(0.1)


def test_a_request_waits_for_others_at_the_best_speed_of_any():
    speeds = Speeds(Clock())
    speeds.note("m", ONE, 128, 0.2)
    speeds.note("n", ONE, 128, 0.1)
    assert speeds.least_seconds("m", 128, 256) == pytest.approx(0.2 + 0.2)
    assert speeds.least_seconds("other", 128, 256) is None


def test_a_dear_batch_does_not_make_a_cheap_one_late():
    speeds = Speeds(Clock())
    speeds.note("m", ONE, 128, 0.1)
    for _ in range(20):
        speeds.note("m", ONE, 128, 0.4)
    assert speeds.seconds("m", ONE) == pytest.approx(0.4, rel=0.05)
    assert speeds.least_seconds("m", 128, 0) == pytest.approx(0.1)
