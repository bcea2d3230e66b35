"""Progress counts U-Net rows, and the time left follows from the cells computed here alone."""

from pathlib import Path

import pytest

from dori.progress import Progress, duration
from dori.run import Run


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_share_and_time_left_are_counted_in_rows() -> None:
    said: list[str] = []
    clock = Hand()
    progress = Progress("audit", {"a": 100, "b": 100, "c": 600, "d": 200}, said.append, clock)
    for key, seconds_s in (("a", 10), ("b", 30), ("c", 200), ("d", 60)):
        clock.now_s += seconds_s
        progress.done(key, stored=False)
    # 100 rows in 10 s leave 900 rows = 90 s; 200 in 40 s leave 800 = 160 s; 800 in 240 s leave 200 = 60 s.
    assert said == [
        "audit: 10 % (1/4 cells), about 2 min left",
        "audit: 20 % (2/4 cells), about 3 min left",
        "audit: 80 % (3/4 cells), about 1 min left",
        "audit: 100 % (4/4 cells)",
    ]


def test_stored_cells_count_as_done_but_not_as_speed() -> None:
    said: list[str] = []
    clock = Hand()
    progress = Progress("audit", {"a": 500, "b": 100, "c": 400}, said.append, clock)
    clock.now_s += 1000
    progress.done("a", stored=True)
    assert said == [] and progress.line() == "audit: 50 % (1/3 cells)"
    clock.now_s += 10
    progress.done("b", stored=False)
    assert said == ["audit: 60 % (2/3 cells), about 40 s left"]
    progress.done("b", stored=False)
    progress.done("not planned", stored=False)
    assert len(said) == 1
    progress.done("c", stored=True)
    assert said[1:] == ["audit: 100 % (3/3 cells)"]


def test_cells_that_cost_nothing_are_counted_by_number() -> None:
    progress = Progress("audit", {"a": 0, "b": 0, "c": 0}, str)
    progress.done("a", stored=False)
    assert progress.line() == "audit: 33 % (1/3 cells)"
    assert Progress("audit", {}, str).line() == "audit: 0 % (0/0 cells)"


def test_hundred_percent_is_said_only_at_the_end() -> None:
    clock = Hand()
    progress = Progress("audit", {"a": 9999, "b": 1}, str, clock)
    clock.now_s += 1
    progress.done("a", stored=False)
    assert progress.line() == "audit: 99 % (1/2 cells), about 1 s left"


@pytest.mark.parametrize(
    ("seconds_s", "text"),
    [
        (0, "1 s"),
        (1.4, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (150.1, "3 min"),
        (3569, "59 min"),
        (3571, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (360000, "100 h 0 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds_s: float, text: str) -> None:
    assert duration(seconds_s) == text


def test_a_run_says_its_progress_and_is_silent_about_what_is_stored(tmp_path: Path) -> None:
    said: list[str] = []
    first = Run(tmp_path, modules=())
    for key in ("a", "b"):
        first.once_record(key, {}, lambda: {"x": 1})
    run = Run(tmp_path, said.append, modules=())
    run.plan("audit", {"a": 10, "b": 10, "c": 20, "d": 60})
    for key in ("a", "b", "c", "d"):
        run.once_record(key, {}, lambda: {"x": 1})
    assert [line.split(",")[0] for line in said] == ["audit: 40 % (3/4 cells)", "audit: 100 % (4/4 cells)"]
