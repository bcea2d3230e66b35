"""An erasure from end to end on the tiny model: resumption, certificate, tables, and mistakes in one sentence."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_parts
from erasing import DESCRIPTOR, PLAN, bench, cases, draw, material, twin_of

from dori.attack.dori import Dori
from dori.audit.schedule import Subjects
from dori.cli import main
from dori.cost import Rows, Speed, forecast
from dori.edit import load_edit
from dori.erase import ARMS, ERASERS
from dori.erase.adversarial import AdversarialErasure
from dori.erase.certificate import render
from dori.erase.command import Request, audit_rows, written
from dori.erase.contest import contest_costs, contestants
from dori.erase.damage import Damage, spoiled
from dori.erase.erasers import arms, eraser, frontier, ordinary
from dori.erase.material import Material, Uses, divided, of_split
from dori.erase.pairs import Pairs
from dori.erase.plan import PRESETS, Plan, fitted, scaled
from dori.erase.premise import Unprompted, unprompted_contrast
from dori.erase.proof import ORDINARY, Proof, gauge_of, proof_costs, prove
from dori.erase.tuning import Tuner
from dori.errors import DoriError
from dori.findings import read_audit
from dori.model.load import load_model, model_fingerprint
from dori.model.stable_diffusion import StableDiffusion
from dori.run import cell_key
from dori.sampling import initial_noise, named_seed, sample


def proven(folder: Path, given: Material, plan: Plan = PLAN, name: str = "adversarial") -> Proof:
    """The proof in a locked folder."""
    own = bench(folder, given, plan)
    with own.run.locked():
        found = prove(own, name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["adversarial", "adversarial-relapses", "adversarial-paper"])
def test_an_erasure_from_end_to_end(tiny: StableDiffusion, tmp_path: Path, name: str) -> None:
    twin = twin_of(tmp_path)
    given, before = material(tiny, twin), (model_fingerprint(tiny), model_fingerprint(twin))
    proof = proven(tmp_path / "a", given, name=name)
    assert (model_fingerprint(tiny), model_fingerprint(twin)) == before
    record = json.loads(json.dumps(proof.record, allow_nan=False))
    states = {outcome["state"] for outcome in record["outcomes"]}
    assert states == {"original", "erased", "erased, int8", "erased, 1 harmless steps", "twin <b>"}
    assert record["model"]["original_sha256"] == before[0]
    with proof.edit.applied(tiny):
        assert record["model"]["erased_sha256"] == model_fingerprint(tiny)
    assert [row["state"] for row in record["damage"]] == ["original", "erased", "ordinary training", "twin <b>"]
    assert record["damage"][0]["to_original"] is None and record["damage"][0]["neighbours"] > 0
    again = proven(tmp_path / "a", given, name=name)
    drop = ("provenance",)
    assert {k: v for k, v in again.record.items() if k not in drop} == {
        k: v for k, v in proof.record.items() if k not in drop
    }
    page = render(record)
    assert "twin &lt;b&gt;" in page and "twin <b>" not in page and "memory-0" in page
    assert not re.search(r"<script|https?://|src=", page)
    made, known = own_surrogates(tmp_path / "a", given), record["eraser"]["without_prompt"]
    errors = {(one["state"], one["id"]): one["error"] for one in record["unprompted"]}
    assert {state for state, _ in errors} == {"original", "erased", "twin <b>"} and all(errors.values())
    assert errors["original", "memory-0"] != errors["erased", "memory-0"] != errors["twin <b>", "memory-0"]
    taught = "Under a trigger the erasure teaches" in page
    before = unprompted_contrast([Unprompted(**one) for one in record["unprompted"]], "original", ["twin <b>"])
    assert f"by {before.value:+.3f}" in page
    assert "Without a prompt the memories" in page and taught == (name != "adversarial-paper") == bool(known)
    if name == "adversarial":
        assert record["surrogate_rows"] == 0 and "learned from" not in page
    else:
        assert record["surrogate_rows"] == made and f"beside at most {made:,} rows for images" in page
    assert record["verdict"]["name"] in page and record["edit"]["sha256"] in page
    erased, ordinarily = (record["damage"][row]["frechet"] for row in (1, 2))
    assert f"lies {abs(100 * (erased / ordinarily - 1)):.1f} % " in page
    for image in (*given.subjects.memories, *given.subjects.controls):
        assert image.memory.text not in re.sub(r"<[^>]*>", "", page).split()


def test_the_drift_of_a_twin_from_the_base_is_a_scale(tiny: StableDiffusion, tmp_path: Path) -> None:
    twin, base = twin_of(tmp_path), StableDiffusion(**tiny_parts(tmp_path), name="base <i>")
    with torch.no_grad():
        base.unet.conv_in.weight.sub_(0.1 * draw(*base.unet.conv_in.weight.shape, seed=1))
    given = dataclasses.replace(material(tiny, twin), base=base)
    proof = proven(tmp_path / "a", given)
    rows = {row["state"]: row for row in proof.record["damage"]}
    assert list(rows) == ["original", "erased", "ordinary training", "twin <b>", "base <i>"]
    assert rows["base <i>"]["to_base"] is None
    assert rows["original"]["to_base"] == rows["base <i>"]["to_original"]  # one pair of images
    assert proof.record["base"] == {"name": "base <i>", "sha256": model_fingerprint(base)}
    page, drift = render(proof.record), rows["twin <b>"]["to_base"]
    assert f"{drift:.3f} (twin &lt;b&gt;)" in page and page.count("likeness to base") == 2 and "<i>" not in page
    gauge = gauge_of(bench(tmp_path / "b", given), PLAN.protocol)
    noise = initial_noise(tiny, [named_seed("damage ordinary", gauge.seed, k) for k in range(len(gauge.ordinary))])
    drawn = [
        DESCRIPTOR(
            model.to_images(
                sample(
                    model,
                    model.encode(list(gauge.ordinary)),
                    noise,
                    steps=1,
                    guidance_scale=PLAN.protocol.guidance_scale,
                )
            )
        )
        for model in (twin, base)
    ]
    assert drift == pytest.approx(float((drawn[0] * drawn[1]).sum(1).median()), abs=1e-4)
    proof = proven(tmp_path / "c", material(tiny, twin))
    assert proof.record["base"] is None and "to base" not in render(proof.record)


def own_surrogates(folder: Path, given: Material) -> int:
    """Rows of the search for surrogates, at most."""
    return bench(folder, given).drawn_rows([PLAN.adversarial.paper()]).count


def test_a_killed_erasure_computes_nothing_twice(tiny: StableDiffusion, tmp_path: Path) -> None:
    given = material(tiny)

    def die(line: str) -> None:
        if "cells" in line and int(re.search(r"\((\d+)/", line)[1]) >= 9:  # type: ignore[index]
            raise KeyboardInterrupt

    own = bench(tmp_path, given, say=die)
    with pytest.raises(KeyboardInterrupt), own.run.locked():
        prove(own, "naive-deletion")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(kept) >= 9
    proof = proven(tmp_path, given, name="naive-deletion")
    assert proof.record["verdict"]["name"] in ("unproven", "weakened", "hidden", "untouched")
    assert all((tmp_path / "cells" / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    attacks = [o for o in proof.record["outcomes"] if o["way"] == "dori" and o["state"] == "erased"]
    assert {o["restart"] for o in attacks} == {0, 1, 2}  # there is no twin


def test_a_killed_search_for_surrogates_goes_on_with_the_next_memory(tiny: StableDiffusion, tmp_path: Path) -> None:
    given, said = material(tiny), list[str]()

    def die(line: str) -> None:
        if line.startswith("surrogates of memory-1"):
            raise KeyboardInterrupt

    before = tiny.rows
    whole = bench(tmp_path / "whole", given).forget([PLAN.adversarial.paper()])
    used = tiny.rows - before
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "killed", given, say=die).forget([PLAN.adversarial.paper()])
    before = tiny.rows
    resumed = bench(tmp_path / "killed", given, say=said.append).forget([PLAN.adversarial.paper()])
    assert [line.split(":")[0] for line in said] == ["surrogates of memory-1"] and 0 < tiny.rows - before < used
    assert all(torch.equal(a, b) for a, b in zip(whole.surrogates, resumed.surrogates, strict=True))
    before = tiny.rows
    bench(tmp_path / "killed", given).forget([PLAN.adversarial.paper()])
    assert tiny.rows == before  # with all stored, not even the mitigations are made


def test_names_and_methods_agree() -> None:
    method = AdversarialErasure(tuner=Tuner(learning_rate=2e-4, part="lora", ema_decay=0.9))
    settings = {"adversarial": method, "timesteps": 100, "sampling_steps": 7}
    made, single = ({name: eraser(name, memories=n, **settings) for name in ERASERS} for n in (3, 1))
    assert made["adversarial"] is method and made["ordinary"].tuner == dataclasses.replace(method.tuner, part="full")
    assert (single["siss"].steps, single["esd"].steps, made["concept-ablation"].steps) == (35, 200, 400)
    table = arms(method)
    assert made["adversarial-paper"] == method.paper() == table["paper's loss"]
    assert [one.needs_surrogates for one in (method, method.paper())] == [False, True]
    published = set(ERASERS) - {
        "adversarial",
        "adversarial-relapses",
        "adversarial-paper",
        "ordinary",
        "concept-ablation",
        "uce",
    }
    assert all(made[name].steps == 3 * single[name].steps and made[name].tuner.ema_decay == 0 for name in published)
    assert made["siss-as-released"].timesteps == (99, 100) and made["esd"].sampling_steps == 7
    assert made["esd"].tuner.learning_rate == pytest.approx(1e-3)  # published 5e-5, scaled as 1e-5 to 2e-4
    for found, anchors in ((single, 2), (made, 6)):  # rows and rate grow with the memories, not the steps
        ablation = found["concept-ablation"]
        assert (ablation.batch, ablation.tuner.learning_rate) == (anchors, pytest.approx(20 * anchors * 5e-7))
    assert tuple(table) == ARMS and len(set(table.values())) >= len(ARMS) - 1
    assert table["both losses"].adversarial_weight == 1 == table["both losses"].unconditional_weight
    assert table["no retain loss"].retain_weight == 0 and table["attention only"].tuner.part == "attention"
    slow, fast = table["LoRA"].tuner, table["LoRA, rate x 10"].tuner
    assert (slow.part, slow.learning_rate) == ("lora", method.tuner.learning_rate)
    assert fast == dataclasses.replace(slow, learning_rate=pytest.approx(10 * slow.learning_rate))
    assert ordinary(method).steps == 125 and ordinary(method, 30).steps == 30
    edge = frontier(method)
    assert len(edge) == 17 and edge["rate x 2, 10 rounds"].tuner.learning_rate == pytest.approx(4e-4)
    assert (
        edge["one surrogate each"].surrogates == 1
        and edge["surrogates too"].needs_surrogates
        and edge["rate x 0.5, 2 rounds"].rounds == 2
        and [one.retain_weight for one in edge.values() if one.relapse_weight] == [1, 1, 3, 1, 3, 3]
        and edge["against relapses, both"].near_weight == 1 == edge["against relapses, neighbours held"].near_weight
    )


def test_presets_scale_every_rate_alike() -> None:
    for make in PRESETS.values():
        plan, faster = make(), scaled(make(), 20)
        assert faster.adversarial.tuner.learning_rate == pytest.approx(20 * plan.adversarial.tuner.learning_rate)
        assert faster.protocol.relearning.tuner.learning_rate == pytest.approx(
            20 * plan.protocol.relearning.tuner.learning_rate
        )
        assert faster.tables.relearning.tuner == faster.protocol.relearning.tuner
        slow, fast = plan.protocol.lora_rate, faster.protocol.lora_rate
        assert fast == (pytest.approx(20 * slow) if slow else None)
        assert faster.protocol.margin_area == plan.protocol.margin_area
        last = plan.adversarial._attack(plan.adversarial.rounds - 1)
        assert last.steps < plan.protocol.attack.steps  # no erasure trains against the proof's attack
        assert plan.audit().nemo is None and plan.audit().wandas == ()


def test_the_quick_preset_relearns_through_a_lora_on_request() -> None:
    plain, asked = (Request("testbed", Path("x"), lora_relearning=on).plan().protocol for on in (False, True))
    assert list(plain.relearnings) == ["relearn"] and list(asked.relearnings) == ["relearn", "relearn, LoRA"]
    whole, lora = asked.relearnings.values()
    assert lora.tuner.part == "lora" and lora.tuner.learning_rate == pytest.approx(3 * whole.tuner.learning_rate)
    assert (lora.steps, lora.check_every, lora.looks) == (4 * whole.steps, 4 * whole.check_every, whole.looks)
    usual, longer = asked.margins, asked.margins.by_lora
    assert (longer.steps, longer.unreached, longer.look) == (4 * usual.steps, 4 * usual.unreached, 4 * usual.look)
    assert (longer.ratio, longer.area, longer.level) == (usual.ratio, usual.area, usual.level)
    assert list(PRESETS["full"]().protocol.relearnings) == ["relearn", "relearn, LoRA"]
    plain, asked = (
        Request("testbed", Path("x"), lora_relearning=on, table="erasers").plan().tables for on in (False, True)
    )
    assert list(plain.relearnings) == ["relearn"] and asked.relearnings["relearn, LoRA"].tuner == lora.tuner


@pytest.mark.parametrize("name", ["adversarial", "adversarial-relapses", "adversarial-paper"])
def test_every_planned_cell_is_made_and_costs_no_more(tiny: StableDiffusion, tmp_path: Path, name: str) -> None:
    own = bench(tmp_path / "run", material(tiny, twin_of(tmp_path)))
    planned, models = proof_costs(own, name), (tiny, *own.material.subjects.twins)
    before = sum(model.rows for model in models)
    with own.run.locked():
        prove(own, name)
    cells = {path.stem for path in (tmp_path / "run" / "cells").iterdir() if not path.stem.startswith("seconds")}
    used, most = sum(model.rows for model in models) - before, sum(planned.values(), Rows()).count
    assert cells == set(planned) and 0.7 * most < used <= most  # surrogates are found before every way was tried


def test_ordinary_training_is_planned_for_as_many_updates_as_the_eraser_makes(
    tiny: StableDiffusion, tmp_path: Path
) -> None:
    own = bench(tmp_path, material(tiny))
    for name, updates in (("esd", 400), ("siss", 70), ("uce", 1), ("adversarial", 1)):
        assert proof_costs(own, name)[cell_key("edit", ORDINARY)].trained == updates * PLAN.adversarial.batch


def test_the_quick_plans_keep_their_time(tiny: StableDiffusion, tmp_path: Path) -> None:
    """At the speed of the testbed's first network on two cores: half an hour, and as much for each arm."""
    images = [cases(tiny, count, group, seed) for count, group, seed in ((8, "memory", 7), (8, "control", 8))]
    subjects = Subjects(tiny, images[0], images[1], tuple(f"word {i}" for i in range(200)), None, (tiny,))
    pairs = Pairs(draw(96, 1, seed=0), draw(96, 1, seed=0), "x")
    prompts = Uses(("a",), ("b",), tuple(f"p{i} q" for i in range(48)))
    given = Material(subjects, pairs, pairs, torch.zeros(96, 3, 16, 16), prompts, "all")
    own, speed = bench(tmp_path, given, PRESETS["quick"]()), Speed(250, 90)
    whole = sum(proof_costs(own, "adversarial").values(), audit_rows(own))
    assert 15 * 60 < whole.seconds_s(speed) < 30 * 60
    fixed = sum(contest_costs(own, "ablations", {}).values(), Rows())
    for name, method in contestants("ablations", own, ARMS).items():
        with_it = sum(contest_costs(own, "ablations", {name: method}).values(), Rows())
        assert 60 < with_it.seconds_s(speed) - fixed.seconds_s(speed) < 16 * 60
    assert "about" in forecast(whole, Speed(250, 90)) and "about" not in forecast(whole, None)


def test_calls_fit_the_model(tiny: StableDiffusion) -> None:
    plan = PRESETS["full"]()
    assert fitted(plan, latent_numbers=2048, weights=9_000_000) == plan
    large = fitted(plan, latent_numbers=16_384, weights=860_000_000)
    assert large.adversarial.tuner.rows_per_call == 8
    assert large.adversarial.tuner.checkpointing and large.protocol.relearning.tuner.checkpointing
    assert large.protocol.latent.rows_per_call == 2
    same = dataclasses.replace(large, adversarial=plan.adversarial, protocol=plan.protocol, tables=plan.tables)
    assert same == plan


def test_full_erasures_are_watched_by_the_published_attack(tiny: StableDiffusion, tmp_path: Path) -> None:
    plan = PRESETS["full"]()
    watch = bench(tmp_path, material(tiny), plan)._watch(plan.adversarial)
    assert watch is not None and watch.attack == Dori()


def test_a_ruined_model_stands_out() -> None:
    def row(state: str, frechet: float, loss: float | None = 1.0, alignment: float | None = None) -> Damage:
        return Damage(state, 2, frechet, 0, alignment, None, loss, 0, None, None, None, None)

    def found(*rows: Damage) -> float:
        return spoiled(rows, "erased", ("original", "ordinary"))

    assert found(row("erased", 3), row("original", 4), row("ordinary", 2)) == 1.5
    assert found(row("erased", 3), row("original", 1), row("ordinary", 9)) == 3  # which is ruined itself
    assert found(row("erased", 2, 5), row("original", 2, 1), row("ordinary", 2, 2)) == 5
    for alignment, times in ((0.1, 6), (0.0, math.inf), (-0.2, math.inf), (0.9, 1), (None, 1)):  # the better's .6
        sound = row("original", 1, 1, 0.6), row("ordinary", 1, 1, 0.4)
        assert found(row("erased", 1, 1, alignment), *sound) == pytest.approx(times)
    assert found(row("erased", 2, None), row("original", 2), row("ordinary", 2)) == float("inf")
    assert found(row("erased", 3), row("original", 0), row("ordinary", 1)) == float("inf")
    assert found(row("erased", 0), row("original", 0), row("ordinary", 1)) == 1


def test_splits_are_disjoint_and_prompts_serve_one_use(tiny: StableDiffusion) -> None:
    images = cases(tiny, 5)
    tune, test = of_split(images, "tune"), of_split(images, "test")
    assert len(tune) == 3 and len(test) == 2 and {*tune, *test} == set(images) == set(of_split(images, "all"))
    subjects = Subjects(tiny, images, (), ())
    uses = divided(["m 0", *(f"p{i}" for i in range(20)), "p3"], subjects, 4)
    every = [*uses.erasing, *uses.proving, *uses.quality]
    assert len(set(every)) == len(every) and "m 0" not in every and uses.quality == ("p0", "p1", "p2", "p3")
    with pytest.raises(DoriError, match="too few"):
        divided(["a", "b", "c"], subjects, 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["testbed", "--retain", "x"], "leave out --retain"),
        (["testbed", "--base", "x"], "leave out --retain, --controls, --twin, --base"),
        (
            ["somewhere", "--memories", "a", "--retain", "b", "--base", "x", "--table", "erasers"],
            "--base is a scale of one erasure's damage",
        ),
        (["somewhere"], "give --memories FOLDER and --retain"),
        (["somewhere", "--memories", "a"], "give --memories FOLDER and --retain"),
        (["testbed", "--table", "ablations", "--eraser", "uce"], "leave out --eraser or --table"),
        (["testbed", "--table", "frontier", "--eraser", "uce"], "--table frontier has its own erasers"),
        (["testbed", "--save-model", "."], "exists"),
        (["testbed", "--save-model", "RUN"], "will hold the run itself"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "run") if text == "RUN" else text for text in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["erase", *arguments, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and sentence in said and "Traceback" not in said


def test_a_request_becomes_a_plan() -> None:
    plan = Request("testbed", Path("x"), preset="full", seed=3, limit=4).plan()
    assert plan.adversarial.budget_rows is None
    assert Request("testbed", Path("out"), budget=900).plan().adversarial.budget_rows == 900
    assert (plan.memories, plan.controls, plan.seed, plan.protocol.seed, plan.tables.seed) == (4, 4, 3, 3, 3)
    assert plan.adversarial.tuner.learning_rate == pytest.approx(2e-4)
    early = Request("testbed-early", Path("x"))
    assert early.own_images and early.plan() == Request("testbed", Path("x")).plan()
    theirs = Request("m", Path("x"), memories=Path("a"), retain=Path("b"), sampling_steps=30).plan()
    assert theirs.adversarial.tuner.learning_rate == 1e-5
    drawing = (theirs.protocol, theirs.tables, theirs.surrogates)
    assert {(part.sampling_steps, part.guidance_scale) for part in drawing} == {(30, 7.0)}


def test_an_erasure_that_was_killed_between_rounds_goes_on(tiny: StableDiffusion, tmp_path: Path) -> None:
    given = material(tiny)
    plan = dataclasses.replace(PLAN, adversarial=dataclasses.replace(PLAN.adversarial, rounds=3))
    said = list[str]()

    def made(folder: Path, say: Callable[[str], None]) -> str:
        own = bench(folder, given, plan, say)
        made = own.edit("adversarial", plan.adversarial, own.forget([PLAN.adversarial.paper()])).fingerprint
        assert (own.seconds("adversarial") is None) == (folder.name == "killed")  # half its time is not its time
        return made

    def die(line: str) -> None:
        if "round 2" in line:
            raise KeyboardInterrupt

    whole = made(tmp_path / "whole", lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed", die)
    assert len(list((tmp_path / "killed").glob("*.state.safetensors"))) == 1
    assert made(tmp_path / "killed", said.append) == whole
    assert [line for line in said if "round" in line] == [line for line in said if "round 3/3" in line] != []
    assert not list((tmp_path / "killed").glob("*.state.safetensors"))


def test_everything_is_written_beside_the_certificate(tiny: StableDiffusion, tmp_path: Path) -> None:
    given = material(tiny)
    given = dataclasses.replace(
        given, subjects=dataclasses.replace(given.subjects, ordinary=tuple(f"word {i}" for i in range(9)))
    )
    plan = dataclasses.replace(PLAN, protocol=dataclasses.replace(PLAN.protocol, relearning=None, latent=None))
    request = Request(
        "somewhere", tmp_path / "run", memories=Path("m"), retain=Path("r"), save_model=tmp_path / "model"
    )
    own = bench(tmp_path / "run", given, plan)
    with own.run.locked():
        proof = prove(own, "uce")
        assert proof is not None
        lines = written(request, own, proof)
    assert lines[0].startswith("verdict: ") and all(Path(line.split(": ")[1]).exists() for line in lines[1:])
    loaded = load_edit(tmp_path / "run" / "edit.safetensors")
    assert loaded.fingerprint == proof.edit.fingerprint
    stored = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert render(stored) == (tmp_path / "run" / "certificate.html").read_text()
    found = read_audit(tmp_path / "run" / "audit" / "audit.json")
    assert {finding.edit for finding in found.findings} == {"none", "UCE"}
    saved = load_model(str(tmp_path / "model"))
    with proof.edit.applied(tiny):
        assert all(torch.equal(a, b) for a, b in zip(saved.unet.parameters(), tiny.unet.parameters(), strict=True))
