"""What a notebook calls: a run's attacks and masks read back, masks and the causal test of one's own, wrong input."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_parts
from safetensors.torch import load, save
from test_locality_run import PLAN, judge, tiny_run, tiny_subjects

from dori.attack.starts import gaussian
from dori.audit.loop import Subjects
from dori.edit import WeightMask, no_edit
from dori.errors import DoriError
from dori.locality import activations as paths
from dori.locality import embeddings as space
from dori.locality import weights
from dori.locality.bench import Bench
from dori.locality.masks import Maskers, Masks, calibrate
from dori.locality.own import Crossing, cross, similarity_to, stacked
from dori.locality.records import Locality
from dori.locality.stored import stored_attacks, stored_masks
from dori.locality.subjects import choose_sets
from dori.locality.triggers import find_triggers
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import EVERYWHERE, StableDiffusion
from dori.run import Run, tensors_sha256
from dori.sampling import Sampling, initial_noise, named_seed

BRIEF = dataclasses.replace(PLAN, causal=None)
SAMPLING = Sampling(PLAN.sampling_steps, PLAN.guidance_scale)


@dataclass(frozen=True, slots=True)
class Done:
    """A finished run, and what computes its cells."""

    found: Locality
    folder: Path
    subjects: Subjects
    bench: Bench

    def maskers(self) -> Maskers:
        """As the run made its masks."""
        calibration = choose_sets(self.subjects, BRIEF).calibration
        return Maskers(self.bench, calibrate(self.bench, calibration), calibration)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    model = StableDiffusion(**tiny_parts(tmp_path_factory.mktemp("parts")), name="tiny")
    subjects, folder = tiny_subjects(model), tmp_path_factory.mktemp("run")
    found = tiny_run(subjects, folder, plan=BRIEF)
    (folder / "locality.json").write_text(found.to_json())
    bench = Bench(model, judge(-1.5), BRIEF, Run(folder, modules=()), model_fingerprint(model), judge(-1.5).record())
    return Done(found, folder, subjects, bench)


@pytest.fixture
def copied(done: Done, tmp_path: Path) -> Path:
    """The run's folder, to be damaged."""
    (tmp_path / "cells").mkdir()
    for path in (done.folder / "locality.json", *(done.folder / "cells").iterdir()):
        (tmp_path / path.relative_to(done.folder)).write_bytes(path.read_bytes())
    return tmp_path


# ------------------------------------------------------------------------------------------------- what a run stored


@pytest.mark.parametrize("memory", ["m1", "m2"])  # with and without a prompt
def test_stored_attacks_are_those_of_the_run_with_their_starts(done: Done, memory: str) -> None:
    read, rows = stored_attacks(done.folder, memory, done.subjects), done.subjects.model.rows
    case = next(case for case in done.subjects.memories if case.memory.id == memory)
    made = find_triggers(done.bench, case, choose_sets(done.subjects, BRIEF).foreign)
    assert done.subjects.model.rows == rows  # the run's own cells
    for name in ("starts", "ends", "similarity", "replicates"):
        assert torch.equal(getattr(read, name), getattr(made, name)), name
    assert (read.names, read.index, read.origin) == (made.names, made.index, made.origin)
    asked = [(one.start, one.index, one.replicates) for one in done.found.triggers if one.memory == memory]
    assert list(zip(read.names, read.index, read.replicates.tolist(), strict=True)) == asked


def test_stored_masks_are_those_of_the_run_for_its_triggers_in_their_order(done: Done) -> None:
    attacks, maskers = stored_attacks(done.folder, "m1", done.subjects), done.maskers()
    chosen, model = attacks.take(attacks.spread(BRIEF.set_size)), done.subjects.model
    for method in ("NeMo", "Wanda 20 %"):
        read = stored_masks(done.folder, "m1", attacks, method, model)
        equal(read, maskers.of("m1", method, chosen))
        again = stored_masks(done.folder, "m1", attacks, method, model, noise=1)
        first = attacks.take(attacks.spread(BRIEF.set_size)[: BRIEF.ceiling])
        equal(again, maskers.again("m1", method, first, 1))
    whole = {o.group: o for o in done.found.overlaps if (o.memory, o.method, o.layer) == ("m1", "Wanda 20 %", "all")}
    assert weights.agreement(read.whole()).published == pytest.approx(whole["triggers"].published, abs=1e-6)


def equal(one: Masks, other: Masks) -> None:
    assert list(one.by_layer) == list(other.by_layer) and one.method == other.method
    assert all(torch.equal(mask, other.by_layer[name]) for name, mask in one.by_layer.items())
    assert torch.equal(one.facts, other.facts) and len(one) == len(other) > 1


def test_what_a_folder_does_not_hold_is_told_in_one_sentence(done: Done, tmp_path: Path) -> None:
    subjects, attacks = done.subjects, stored_attacks(done.folder, "m1", done.subjects)
    with pytest.raises(DoriError, match=r"locality\.json cannot be read"):
        stored_attacks(tmp_path, "m1", subjects)
    with pytest.raises(DoriError, match=r"no attacks on a memory 'm0'; give one that it finished \(m2, m1\)"):
        stored_attacks(done.folder, "m0", subjects)
    with pytest.raises(DoriError, match=r"no masks of 'm1' by 'Wanda' under noise 0; it has them by NeMo, Wanda 20 %"):
        stored_masks(done.folder, "m1", attacks, "Wanda", subjects.model)
    with pytest.raises(DoriError, match="noise 2; .* under noises 0 to 1"):
        stored_masks(done.folder, "m1", attacks, "NeMo", subjects.model, noise=2)
    with pytest.raises(DoriError, match="not made from these attacks"):
        stored_masks(done.folder, "m1", stored_attacks(done.folder, "m2", subjects), "NeMo", subjects.model)


def test_subjects_of_another_run_are_refused(done: Done, tmp_path: Path) -> None:
    other = StableDiffusion(**tiny_parts(tmp_path), name="other")
    with torch.no_grad():
        next(other.unet.parameters()).mul_(2)
    attacks = stored_attacks(done.folder, "m1", done.subjects)
    with pytest.raises(DoriError, match="not made from this model; give the model"):
        stored_attacks(done.folder, "m2", dataclasses.replace(done.subjects, model=other))
    with pytest.raises(DoriError, match="not made from this model; give the model"):
        stored_masks(done.folder, "m1", attacks, "NeMo", other)
    for ordinary in ((), tuple(f"sentence {k}" for k in range(13))):
        with pytest.raises(DoriError, match="no 2 ordinary prompts of these subjects"):
            stored_attacks(done.folder, "m2", dataclasses.replace(done.subjects, ordinary=ordinary))


def test_a_damaged_cell_is_refused_and_nothing_is_unpickled(done: Done, copied: Path) -> None:
    cell = copied / "cells" / "triggers.m2.gaussian.0.safetensors"
    kept = cell.read_bytes()
    for broken in (kept[:-3], b"\x80\x04N.", b""):
        cell.write_bytes(broken)
        with pytest.raises(DoriError, match="triggers.m2.gaussian.0.safetensors cannot be read as a cell"):
            stored_attacks(copied, "m2", done.subjects)
    for header in ("{}", "[", json.dumps({"sha256": 0, "inputs": {}})):
        cell.write_bytes(save(load(kept), {"dori": header}))
        with pytest.raises(DoriError, match="is no whole cell"):
            stored_attacks(copied, "m2", done.subjects)
    length, others = int.from_bytes(kept[:8], "little"), {"end": torch.zeros(3, 2)}
    header = json.loads(json.loads(kept[8 : 8 + length])["__metadata__"]["dori"]) | {"sha256": tensors_sha256(others)}
    cell.write_bytes(save(others, {"dori": json.dumps(header)}))
    with pytest.raises(DoriError, match="holds no 'end' of shape"):
        stored_attacks(copied, "m2", done.subjects)
    cell.write_bytes(kept)
    (copied / "cells" / "judged.m2.gaussian.0.safetensors").unlink()
    with pytest.raises(DoriError, match="judged.m2.gaussian.0.safetensors cannot be read"):
        stored_attacks(copied, "m2", done.subjects)


def test_a_judgement_of_other_attacks_is_refused(done: Done, copied: Path) -> None:
    """As after a run that was stopped while it was made again."""
    cells = copied / "cells"
    (cells / "judged.m2.foreign.0.safetensors").write_bytes((cells / "judged.m1.foreign.0.safetensors").read_bytes())
    with pytest.raises(DoriError, match="not made from these attacks; give those of its own memory"):
        stored_attacks(copied, "m2", done.subjects)


# ----------------------------------------------------------------------------------------------------------- one's own


def test_masks_of_own_embeddings_are_those_that_a_run_makes(done: Done) -> None:
    attacks, maskers = stored_attacks(done.folder, "m1", done.subjects), done.maskers()
    model, y = done.subjects.model, attacks.ends[attacks.spread(3)]
    seeds = {method: named_seed("locality masks", method, BRIEF.seed, 0) for method in ("NeMo", "Wanda")}
    stored = stored_masks(done.folder, "m1", attacks, "Wanda 20 %", model).take(range(3))
    mine = stacked([BRIEF.wandas[0](model, one[None], seed=seeds["Wanda"]) for one in y])
    assert all(torch.equal(mask, stored.by_layer[name]) for name, mask in mine.by_layer.items())
    assert weights.agreement(mine.whole()) == weights.agreement(stored.whole())
    edits = [BRIEF.nemo(model, one[None], maskers.calibration, seed=seeds["NeMo"]) for one in y]
    stored, neurons = stored_masks(done.folder, "m1", attacks, "NeMo", model), stacked(edits, neurons=True)
    assert {name: mask[:3].tolist() for name, mask in stored.by_layer.items()} == {
        name: mask.tolist() for name, mask in neurons.by_layer.items()
    }
    assert mine.edit(model, 1).fingerprint == BRIEF.wandas[0](model, y[1:2], seed=seeds["Wanda"]).fingerprint


def test_neurons_count_once_and_only_whole_rows_are_neurons() -> None:
    rows = torch.tensor([[True, True], [False, False], [True, True]])
    one, two = (
        WeightMask("NeMo", {"w": rows}),
        WeightMask("NeMo", {"w": rows.flip(0) & torch.tensor([[True], [False], [False]])}),
    )
    assert stacked([one, two], neurons=True).by_layer["w"].tolist() == [[True, False, True], [True, False, False]]
    assert stacked([one, two]).by_layer["w"].shape == (2, 3, 2)
    part = WeightMask("Wanda", {"w": torch.tensor([[True, False]])})
    for edits, word in (
        ([], "empty"),
        ([one, part], "different"),
        ([no_edit()], "none"),
        ([part], "parts of rows of w"),
    ):
        with pytest.raises(DoriError, match=word):
            stacked(edits, neurons=True)


def crossing(done: Done, edits: list[WeightMask], /, **changed: object) -> Crossing:
    """The causal test on the first two triggers of m1."""
    attacks = stored_attacks(done.folder, "m1", done.subjects)
    image = next(case.image for case in done.subjects.memories if case.memory.id == "m1")
    given: dict[str, object] = {
        "image": image,
        "triggers": attacks.ends[:2],
        "edits": edits,
        "descriptor": done.bench.judge.descriptor,
        "attack": BRIEF.attack,
        "fresh": 2,
        "seeds": BRIEF.fresh_seeds(),
        "sampling": SAMPLING,
    }
    return cross(done.subjects.model, **(given | changed))  # type: ignore[arg-type]


def test_the_causal_test_on_own_triggers_is_attack_and_judgement_under_each_edit(done: Done) -> None:
    model, attacks = done.subjects.model, stored_attacks(done.folder, "m1", done.subjects)
    case = next(case for case in done.subjects.memories if case.memory.id == "m1")
    edits = [no_edit(), *(BRIEF.wandas[0](model, attacks.ends[row : row + 1], seed=0) for row in range(2))]
    before = model_fingerprint(model)
    found = crossing(done, edits)
    assert model_fingerprint(model) == before
    assert (found.replay.shape, found.again.shape, found.fresh.shape) == ((3, 2), (3, 2), (3, 2))
    judged = attacks.similarity[:2].double().quantile(0.5, dim=1)
    assert torch.allclose(found.replay[0], judged, atol=1e-6)  # as the run judged them
    starts = torch.cat(
        [attacks.ends[:2], gaussian(model, [named_seed("cross fresh start", 0, 2, k) for k in range(2)])]
    )
    seeds = [*(named_seed("cross", 0, k) for k in range(2)), *(named_seed("cross fresh", 0, 2, k) for k in range(2))]
    with edits[2].applied(model):
        ends = BRIEF.attack(model, case.latent.expand(4, -1, -1, -1), starts, seeds=seeds).at(BRIEF.attack.steps)
        like = done.bench.similarities(case, torch.cat([attacks.ends[:2], ends]), BRIEF.fresh_seeds())
    wanted = like.double().quantile(0.5, dim=1)
    assert torch.allclose(torch.cat([found.replay[2], found.again[2], found.fresh[2]]), wanted, atol=1e-6)
    assert not torch.allclose(found.replay[0], found.replay[1]) and not torch.allclose(found.again[1], found.again[2])
    alone = crossing(done, edits[:1], fresh=0, triggers=attacks.ends[:2].numpy())
    assert alone.fresh.shape == (1, 0) and torch.allclose(alone.again, found.again[:1], atol=1e-6)


def test_a_generation_that_diverges_is_like_nothing(done: Done) -> None:
    case, nowhere = done.subjects.memories[0], torch.full((1, *done.subjects.model.embedding_shape), math.nan)
    descriptor = done.bench.judge.descriptor
    like = similarity_to(case.image, done.subjects.model, nowhere, descriptor, seeds=[0, 1], sampling=SAMPLING)
    assert like.tolist() == [0]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"edits": []}, "0 edits, 2 seeds and 2 fresh"),
        ({"seeds": []}, "1 edits, 0 seeds"),
        ({"fresh": -1}, "-1 fresh attacks"),
        ({"image": torch.zeros(3, 8, 8)}, r"draws \(3, 16, 16\); resize it"),
        ({"image": torch.full((3, 16, 16), 2.0)}, "rescale"),
        ({"triggers": torch.zeros(2, 3, 16)}, r"triggers have shape \(2, 3, 16\) and tiny reads \(n, 12, 16\)"),
        ({"triggers": torch.zeros(0, 12, 16)}, "at least 1"),
    ],
)
def test_a_causal_test_of_what_does_not_fit_is_refused(done: Done, changed: dict[str, object], word: str) -> None:
    with pytest.raises(DoriError, match=word):
        crossing(done, [no_edit()], **changed)


# --------------------------------------------------------------------------------------------------------- wrong input

MASKS = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)) < 0.5
Y = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
PAIRS = torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: weights.agreement(MASKS.float()), "masks holds torch.float32, not booleans; give"),
        (lambda: weights.random_level(MASKS.float()), "not booleans"),
        (lambda: weights.random_like(MASKS.long(), seed=0), "not booleans"),
        (lambda: weights.agreement(MASKS.numpy().astype(float)), "not booleans"),
        (lambda: weights.agreement(list(MASKS)), "masks is a list; give one tensor"),
        (lambda: weights.agreement(MASKS[0, 0]), r"masks is a Tensor of shape \(5,\)"),
        (lambda: weights.agreement(np.array([["a", "b"]])), r"masks is a ndarray of shape \(1, 2\)"),
        (lambda: weights.agreement_within([]), "groups is empty"),
        (lambda: weights.agreement_within([MASKS, MASKS.float()]), "not booleans"),
        (lambda: weights.overlaps(MASKS, MASKS[:, :1]), "masks of 10 and of 5 weights"),
        (lambda: weights.agreement_across([], PAIRS), "halves is empty"),
        (lambda: weights.agreement_across([([MASKS], [MASKS])], PAIRS.long()), "pairs holds torch.int64, not booleans"),
        (lambda: weights.agreement_across([([MASKS], [MASKS])], PAIRS[:2]), r"pairs has shape \(2, 3\); give"),
        (lambda: weights.agreement_across([([MASKS], [])], PAIRS), "groups of 1 and 0 layers"),
        (lambda: weights.agreement_across([([MASKS],)], PAIRS), "groups of 1 layers; give two"),
        (lambda: weights.agreement_across([([MASKS, MASKS[:2]], [MASKS] * 2)], PAIRS), r"\[3, 2\] masks by layer"),
        (lambda: weights.random_agreement(3, 9, 8), "masks of 3 and 9 weights among 8 are impossible"),
        (lambda: weights.random_agreement(-1, 2, 8), "impossible"),
        (lambda: weights.random_agreement(1.5, 2, 8), "impossible"),  # type: ignore[arg-type]
        (lambda: space.shared_share(Y, Y[:3]), r"first and second have shapes \(4, 3, 2\) and \(3, 3, 2\)"),
        (lambda: space.shared_share(Y, Y[:1]), "as many of each"),
        (lambda: space.repeated_share(Y, Y[:1]), "as many of each"),
        (lambda: space.moved(Y[:1], Y), "starts and ends have shapes"),
        (lambda: space.own_start_share(Y, Y[:2]), "starts and ends have shapes"),
        (lambda: space.exchanged_share(Y, Y[:1]), "starts and ends have shapes"),
        (lambda: space.own_start_share(Y, Y * math.nan), "ends holds a number that is not finite"),
        (lambda: space.pair_distances(Y[0, 0]), "embeddings is a Tensor of shape"),
        (lambda: space.common_share([Y]), "moves is a list"),  # type: ignore[arg-type]
        (lambda: space.principal_map(Y[:2]), "embeddings holds 2; give at least 3"),
        (lambda: space.principal_map(Y / 0), "not finite"),
        (lambda: space.neighbour_map(Y[:2], perplexity=30, seed=0), "at least 3"),
        (lambda: space.neighbour_map(Y, perplexity=0, seed=0), "perplexity is 0"),
        (lambda: space.line(Y[0], Y[0, :2], (0.5,)), "have shapes"),
        (lambda: space.line(Y[0], Y[1], ()), "shares is empty"),
        (lambda: space.sphere(Y[0], -1.0, seed=0, count=2), "radius -1.0 with 2"),
        (lambda: space.gaussian_distance(0), "entries is 0"),
        (lambda: paths.discrepancy(Y[0, 0]), "activations is a Tensor of shape"),
        (lambda: paths.discrepancy_across(Y, Y[:, :2], torch.ones(4, 4).bool()), "of 6 and of 4 entries"),
        (lambda: paths.discrepancy_across(Y, Y, torch.ones(4, 4)), "pairs holds torch.float32"),
        (lambda: paths.discrepancy_across(Y, Y, torch.ones(4, 3).bool()), r"pairs has shape \(4, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(call: Callable[[], object], word: str) -> None:
    with pytest.raises(DoriError, match=word) as refused:
        call()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"steps": (2, 0)}, r"steps is \(2, 0\); give whole numbers that ascend"),
        ({"steps": ()}, r"steps is \(\)"),
        ({"steps": (0, 0)}, "ascend"),
        ({"steps": (-1,)}, "ascend"),
        ({"steps": (0.5,)}, "whole numbers"),
        ({"steps": (50,)}, "steps reach 50 and the grid of 3 steps ends at 2"),
        ({"steps": (3,)}, "steps reach 3"),
        ({"ddim_steps": 0}, "ddim_steps is 0; tiny has grids of 1 to 1000"),
        ({"rows_per_call": 1}, "rows_per_call is 1"),
        ({"layers": {}}, "layers hold no layer"),
        ({"layers": {"x": torch.nn.Linear(2, 2)}}, "layers hold x, which is no layer of tiny's U-Net"),
        ({"embeddings": torch.zeros(2, 12, 8)}, "embeddings have shape"),
        ({"embeddings": torch.zeros(0, 12, 16)}, "embeddings holds 0; give at least 1"),
        ({"noise": torch.zeros(3, 3, 8, 8)}, r"noise has shape \(3, 3, 8, 8\); .* or 2, one for each"),
        ({"noise": torch.zeros(1, 3, 4, 4)}, "noise has shape"),
    ],
)
def test_activations_refuse_at_the_call_what_they_would_leave_out(
    tiny: StableDiffusion, changed: dict[str, object], word: str
) -> None:
    given: dict[str, object] = {
        "layers": tiny.layers("feed_forward", EVERYWHERE),
        "embeddings": torch.zeros(2, 12, 16),
        "noise": torch.zeros(1, 3, 8, 8),
        "ddim_steps": 3,
    }
    with pytest.raises(DoriError, match=word):
        paths.activations(tiny, **(given | changed))  # type: ignore[arg-type]
    assert tiny.rows == 0


def test_numpy_arrays_give_what_tensors_give(tiny: StableDiffusion) -> None:
    masks, y = MASKS.numpy(), Y.numpy()
    fixed = masks.copy()
    fixed.flags.writeable = False
    assert weights.agreement(masks) == weights.agreement(MASKS) == weights.agreement(fixed)
    assert weights.agreement(masks[:, ::-1]) == weights.agreement(MASKS.flip(1))
    assert weights.agreement_across([([masks], [masks])], PAIRS.numpy()) == weights.agreement_across(
        [([MASKS], [MASKS])], PAIRS
    )
    assert weights.random_level(masks) == weights.random_level(MASKS)
    assert torch.equal(weights.random_like(masks, seed=1), weights.random_like(MASKS, seed=1))
    assert space.shared_share(y, y[::-1]) == space.shared_share(Y, Y.flip(0))
    assert space.exchanged_share(y, y + 1) == space.exchanged_share(Y, Y + 1)
    assert torch.equal(space.moved(y, y.astype(">f4") + 1), space.moved(Y, Y + 1))
    assert torch.equal(space.line(y[0], y[1], (0.5,)), space.line(Y[0], Y[1], (0.5,)))
    assert torch.equal(space.sphere(y[0], 2.0, seed=0, count=3), space.sphere(Y[0], 2.0, seed=0, count=3))
    assert torch.equal(space.principal_map(y)[0], space.principal_map(Y)[0])
    assert paths.discrepancy(y) == paths.discrepancy(Y)
    layers, noise = tiny.layers("attention_value", EVERYWHERE), initial_noise(tiny, [0])
    embeddings = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
    (_, one), (_, two) = (
        next(paths.activations(tiny, layers, *given))
        for given in ((embeddings, noise), (embeddings.numpy(), noise.numpy()))
    )
    assert all(torch.equal(one[name], two[name]) for name in layers)
