"""What a load's progress bar says."""

from moorage import LoadProgress
from moorage.answers import Stage
from moorage.progress import note, placed


def test_what_is_said_beside_the_bar():
    stages = {
        "fetch": Stage(1, 2, 1.0),
        "place": Stage(3, 8, 1.0),
        "compile": Stage(4, 12, 1.0),
        "prove": Stage(5, 6, 1.0),
    }
    progress = LoadProgress("loading", stages, 2, 1.0)
    assert note(progress) == "loading, 50% fetched, 4/12 programs, 5/6 trials, 2 waiting"
    assert placed(progress) == (3, 8)


def test_stages_that_are_not_known_yet_are_left_out():
    progress = LoadProgress("loading", {"fetch": Stage(1, 0, 0.0), "prove": Stage(0, 0, 0.0)}, 1, 1)
    assert note(progress) == "loading"
    assert placed(progress) == (1, 0)
