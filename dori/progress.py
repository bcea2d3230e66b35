"""How far a run is and how long it will take, counted in U-Net rows, not in cells: cells differ in cost.

Cells that an earlier process stored count as done but not towards the speed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    """Planned cells and what is done of them.

    Args:
        title: first word of each line.
        costs: planned cells, key to cost in U-Net rows (at least 0).
        say: receives a line after each computed cell, and after the last one.
        clock: seconds that never run backwards.
    """

    title: str
    costs: dict[str, int]
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _finished: set[str] = field(default_factory=set, init=False)
    _rows: int = field(default=0, init=False)  # computed here, in
    _seconds_s: float = field(default=0.0, init=False)
    _mark_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._mark_s = self.clock()

    def done(self, key: str, *, stored: bool) -> None:
        """Count one cell; keys that were not planned or are counted already change nothing."""
        now_s = self.clock()
        if key in self.costs and key not in self._finished:
            self._finished.add(key)
            if not stored:
                self._rows += self.costs[key]
                self._seconds_s += now_s - self._mark_s
            if not stored or len(self._finished) == len(self.costs):
                self.say(self.line())
        self._mark_s = now_s

    def line(self) -> str:
        """One line, such as "audit: 34 % (12/31 cells), about 4 min left"."""
        total = sum(self.costs.values())
        finished = sum(self.costs[key] for key in self._finished)
        # Rounded down: 100 % is said only when nothing is left.
        percent = 100 * finished // total if total else 100 * len(self._finished) // max(1, len(self.costs))
        text = f"{self.title}: {percent} % ({len(self._finished)}/{len(self.costs)} cells)"
        if self._rows == 0 or finished == total:
            return text
        return f"{text}, about {duration(self._seconds_s * (total - finished) / self._rows)} left"


def duration(seconds_s: float) -> str:
    """A length of time as people say it: "40 s", "4 min", "2 h 10 min"."""
    if seconds_s < 59.5:
        return f"{max(1, round(seconds_s))} s"
    minutes = round(seconds_s / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
