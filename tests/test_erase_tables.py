"""Tables of edits: rows, reasons, stored records, and rows of several runs in one."""

import dataclasses
import statistics
from pathlib import Path

import pytest
from erasing import DESCRIPTOR, PLAN, bench, material, twin_of

from dori.audit.judge import Judge
from dori.cli import main
from dori.erase import ARMS, ERASERS
from dori.erase.cells import Bench
from dori.erase.command import Request, _table
from dori.erase.contest import contest, contest_costs, contestants, row_names
from dori.erase.erasers import frontier
from dori.erase.tables import Table, joined, memory_rows, read_table, to_markdown
from dori.erase.tuning import Tuner
from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion
from dori.run import cell_key, write_json


@pytest.mark.parametrize("kind", ["erasers", "ablations"])
def test_a_table_has_a_row_for_each_and_says_what_failed(kind: str, tiny: StableDiffusion, tmp_path: Path) -> None:
    names = ("esd", "uce") if kind == "erasers" else ("paper's loss", "LoRA")
    twins = [twin_of(tmp_path)] if kind == "ablations" else []
    own = bench(tmp_path / "run", material(tiny, *twins))
    if kind == "ablations":
        asked = dataclasses.replace(own.plan.tables, lora_rate=0.1)
        own = dataclasses.replace(own, plan=dataclasses.replace(own.plan, tables=asked))
    few = contestants(kind, own, names)  # type: ignore[arg-type]
    if kind == "erasers":
        diverging = Tuner(learning_rate=1e25, part="cross_attention")
        few["esd"] = dataclasses.replace(few["esd"], steps=5, tuner=diverging)
        # All memories come back; the arms' surrogates could not be told from copies then.
        own = dataclasses.replace(own, judge=Judge(dataclasses.replace(DESCRIPTOR, threshold=-1.0)))
    planned = contest_costs(own, kind, few)  # type: ignore[arg-type]
    parts: list[Table] = []
    with own.run.locked():
        table = contest(own, kind, few, parts.append)  # type: ignore[arg-type]
    cells = {path.stem for path in (tmp_path / "run" / "cells").iterdir() if not path.stem.startswith("seconds")}
    failed = {key for key in planned if "esd" in key} if kind == "erasers" else set()
    assert cells == set(planned) - failed
    assert {test.state for test in table.tests()} >= ({"original"} if kind == "erasers" else set())
    stored = {o.id for o in table.outcomes if o.state == "original" and statistics.median(o.similarities) > o.threshold}
    assert all(test.found.counts[0] <= len(stored) for test in table.tests())
    (part,) = parts  # after the first of two; what comes after the last is the table itself
    order = ERASERS if kind == "erasers" else ARMS
    assert part.left == tuple(name for name in order if name != names[0])
    assert table.left == tuple(name for name in order if name not in names)
    rows, text = memory_rows(table), to_markdown(table)
    assert memory_rows(part) == rows[: len(memory_rows(part))] and part.entries == table.entries[:1]
    assert f"Not made yet: {'; '.join(table.left)}." in text
    assert ("drawn once" in text) == (kind == "ablations")  # neither UCE nor ESD learns from surrogates
    made = [
        "original",
        *(twin.name for twin in twins),
        *(name for name in names if kind == "ablations" or name == "uce"),
    ]
    lines = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert lines == ["memories", "---", *made, "controls", "---", *made]
    assert "from noise" in text and {text.splitlines()[k].count("|") for k in range(len(made) + 2)} == {
        25 if kind == "ablations" else 23  # relearned through a LoRA too, and compared
    }
    if kind == "erasers":
        assert "esd: training tiny diverged" in text
    write_json(tmp_path / "table.json", dataclasses.asdict(table))
    assert to_markdown(read_table(tmp_path / "table.json")) == text


def test_ordinary_training_in_a_table_is_as_long_as_the_erasure_beside_it(
    tiny: StableDiffusion, tmp_path: Path
) -> None:
    early = dataclasses.replace(PLAN.adversarial, rounds=3, budget_rows=1)  # it ends after the first round
    brief = dataclasses.replace(PLAN.tables, starts=("prompt",), relearning=None, latent=None)
    own = bench(tmp_path, material(tiny), dataclasses.replace(PLAN, adversarial=early, tables=brief))
    few = contestants("erasers", own, ("adversarial", "ordinary"))
    assert contest_costs(own, "erasers", few)[cell_key("edit", "ordinary")].trained == 3 * early.batch  # at most
    with own.run.locked():
        made = {entry.name: entry.rows for entry in contest(own, "erasers", few).entries}
    assert made["ordinary"] == early.batch < made["adversarial"]


BRIEF = dataclasses.replace(PLAN, tables=dataclasses.replace(PLAN.tables, relearning=None, latent=None))


def rows_of(own: Bench, *names: str, others: dict[Path, Table] | None = None) -> Table:
    """A table of some erasers."""
    with own.run.locked():
        return contest(own, "erasers", contestants("erasers", own, names), others=others)


def test_rows_of_several_runs_make_the_table_that_one_run_makes(tiny: StableDiffusion, tmp_path: Path) -> None:
    given = material(tiny, twin_of(tmp_path))
    own = {name: bench(tmp_path / name, given, BRIEF) for name in ("whole", "a", "b")}
    whole = rows_of(own["whole"], "adversarial", "naive-deletion", "uce")
    write_json(tmp_path / "a.json", dataclasses.asdict(rows_of(own["a"], "uce", "adversarial")))
    a = read_table(tmp_path / "a.json")
    both = rows_of(own["b"], "naive-deletion", "uce", others={tmp_path / "a.json": a})
    assert [(made.rows, len(made.provenance) > 0) for made in both.made] == [
        (("naive-deletion", "uce"), True),
        (("adversarial",), True),
    ]
    one, other = (
        dataclasses.replace(
            table, made=(), entries=tuple(dataclasses.replace(entry, seconds=None) for entry in table.entries)
        )
        for table in (whole, both)
    )
    assert one == dataclasses.replace(other, settings=one.settings) and both.settings == whole.settings
    assert [row[0] for row in memory_rows(both)] == ["original", "twin <b>", "adversarial", "naive-deletion", "uce"]


def test_rows_that_answer_another_question_are_refused(tiny: StableDiffusion, tmp_path: Path) -> None:
    given, path = material(tiny), tmp_path / "a.json"
    a = rows_of(bench(tmp_path / "a", given, BRIEF), "uce")
    seeded = bench(tmp_path / "b", given, dataclasses.replace(BRIEF, seed=1))
    before = tiny.rows
    with pytest.raises(DoriError, match=r"a\.json cannot stand .* made with other settings \(seed\)"):
        rows_of(seeded, "uce", others={path: a})
    with pytest.raises(DoriError, match="is a table of ablations; give one of erasers"):
        rows_of(seeded, "uce", others={path: dataclasses.replace(a, kind="ablations")})
    assert tiny.rows == before  # before anything is computed
    moved = tuple(
        dataclasses.replace(o, similarities=tuple(s + 0.05 for s in o.similarities)) if o.way == "prompt" else o
        for o in a.outcomes
    )
    other = bench(tmp_path / "c", given, BRIEF)
    with pytest.raises(DoriError, match="cannot stand beside these rows: original drew memory-0 otherwise"):
        rows_of(other, "esd", others={path: dataclasses.replace(a, outcomes=moved)})
    cells = {cell.stem for cell in (tmp_path / "c" / "cells").iterdir()}
    assert not [name for name in cells if name.startswith("edit")]  # nothing was erased yet
    torn = tuple(dataclasses.replace(o, similarities=(*o.similarities, 0.0)) for o in a.outcomes)
    with pytest.raises(DoriError, match="original drew memory-0 otherwise"):
        joined(a, {path: dataclasses.replace(a, outcomes=torn)})
    near = tuple(dataclasses.replace(row, neighbours_shown=9) for row in a.damage)
    with pytest.raises(DoriError, match="other neighbours of the captions"):
        joined(a, {path: dataclasses.replace(a, damage=near)})
    fewer = tuple(o for o in a.outcomes if o.id != "memory-1")
    with pytest.raises(DoriError, match="other images or twins were asked"):
        joined(a, {path: dataclasses.replace(a, outcomes=fewer)})


def test_ordinary_training_of_another_length_is_no_scale(tiny: StableDiffusion, tmp_path: Path) -> None:
    early = dataclasses.replace(BRIEF.adversarial, rounds=3, budget_rows=1)
    plan, given = dataclasses.replace(BRIEF, adversarial=early), material(tiny)
    alone = rows_of(bench(tmp_path / "a", given, plan), "adversarial")
    long = rows_of(bench(tmp_path / "b", given, plan), "ordinary")
    assert [table.entries[0].updates for table in (alone, long)] == [1, 3]
    beside = rows_of(bench(tmp_path / "c", given, plan), "ordinary", others={tmp_path / "a.json": alone})
    assert [(entry.name, entry.updates) for entry in beside.entries] == [("adversarial", 1), ("ordinary", 1)]
    with pytest.raises(DoriError, match="ordinary training made 3 updates and the adversarial erasure 1"):
        joined(long, {tmp_path / "a.json": alone})


def test_a_longer_table_stays(tiny: StableDiffusion, tmp_path: Path) -> None:
    own = bench(tmp_path / "run", material(tiny), BRIEF)
    request = Request("testbed", tmp_path / "run", table="erasers", rows=("uce", "gradient-ascent"))
    with own.run.locked():
        _table(request, "erasers", own, {})
        both = (tmp_path / "run" / "table.md").read_text()
        said = _table(dataclasses.replace(request, rows=("uce",)), "erasers", own, {})
    assert "gradient-ascent" in both and (tmp_path / "run" / "table.md").read_text() == both
    assert "gradient-ascent |" not in said[0] and said[1].endswith("(a longer one, which stays)")


@pytest.mark.parametrize("name", ["erasers", "ablations"])
def test_the_tables_of_the_documentation_can_be_read(name: str) -> None:
    folder = Path(__file__).parent.parent / "docs" / "records" / name
    if name == "erasers" or folder.exists():
        table = read_table(folder / "table.json")
        assert table.kind == name and to_markdown(table) == (folder / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        (["--row", "uce"], "give --table, or leave them out"),
        (["--take", "a.json"], "give --table, or leave them out"),
        (["--table", "erasers", "--row", "ucé"], "--table erasers has these, once each: adversarial; "),
        (["--table", "ablations", "--row", "LoRA", "--row", "LoRA"], "three rounds"),
        (["--table", "frontier", "--row", "LoRA"], "one surrogate each"),
        (["--table", "erasers", "--take", "none.json"], "none.json cannot be read"),
        (["--eraser", "siss", "--budget", "900"], "siss would not heed it"),
    ],
)
def test_mistakes_about_rows_are_one_sentence(
    arguments: list[str], mend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["erase", "testbed", "--out", str(tmp_path / "run"), *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert mend in said and said.count("\n") == 1 and not (tmp_path / "run" / "cells").exists()


def test_every_table_names_its_rows() -> None:
    assert row_names("erasers", PLAN.adversarial) == ERASERS and row_names("ablations", PLAN.adversarial) == ARMS
    assert row_names("frontier", PLAN.adversarial) == tuple(frontier(PLAN.adversarial))
