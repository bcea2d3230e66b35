"""Adversarial fine-tuning does its arms, resumes bit for bit, stops on evidence; surrogates are no copies."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import tiny_parts
from erasing import DESCRIPTOR, cases, draw, forget, retain
from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.judge import Case
from dori.edit import no_edit
from dori.erase.adversarial import AdversarialErasure
from dori.erase.decide import PART, deciding, deciding_pairs
from dori.erase.delta import CannotErase
from dori.erase.pairs import Batch, Forget, Work, former_losses, step_generator
from dori.erase.relapse import Relapse
from dori.erase.starts import starting_points
from dori.erase.surrogates import Surrogates, SurrogateSearch, anchor_prompts, filtered, shortened
from dori.erase.terms import TERMS, Lesson
from dori.erase.tuning import Tuner, tuning
from dori.erase.unprompted import without_prompt
from dori.erase.watch import Watch
from dori.errors import DoriError
from dori.metrics.similarity import Descriptor, cosine, masked_similarity
from dori.model.stable_diffusion import StableDiffusion

ROOT = Path(__file__).parent.parent
METHOD = AdversarialErasure(
    rounds=3,
    steps_per_round=2,
    batch=4,
    attack=Dori(steps=2, batch=1),
    adversarial_weight=1.0,
    relapse_weight=1.0,
    relapse=Relapse(steps=1, every=1),
    tuner=Tuner(learning_rate=1e-3, ema_decay=0.5),
)
PLAIN = dataclasses.replace(METHOD, adversarial_weight=0.0, relapse_weight=0.0)


def watch(model: StableDiffusion, threshold: float = 0.7) -> Watch:
    """A cheap judge of the three memories."""
    images = model.to_images(draw(3, *model.latent_shape, seed=1))
    shown = tuple(dataclasses.replace(case, image=image) for case, image in zip(cases(model), images, strict=True))
    return Watch(
        dataclasses.replace(DESCRIPTOR, threshold=threshold),
        shown,
        sampling_steps=1,
        seeds=2,
        attack=Dori(steps=1, batch=1),
        starts=("gaussian",),
    )


def lesson(
    model: StableDiffusion,
    memories: Forget,
    triggers: Tensor,
    visited: Sequence[int],
    *,
    batch: int,
    prompt_too: bool = True,
) -> Lesson:
    """What an update would draw from."""
    with tuning(model, Tuner(), seed=0) as tuned:
        return Lesson(tuned, memories, retain(model), triggers, visited, batch, prompt_too)


class Killed(Exception):
    """Stands for a kill between two rounds."""


@pytest.mark.parametrize("method", [METHOD, PLAIN], ids=["all terms", "default"])
def test_a_killed_erasure_goes_on_to_the_same_weights(
    tiny: StableDiffusion, tmp_path: Path, method: AdversarialErasure
) -> None:
    whole = method(tiny, forget(tiny), retain(tiny), seed=0, watch=watch(tiny))
    checkpoint, said = tmp_path / "state.safetensors", list[str]()

    def die(line: str) -> None:
        said.append(line)
        if "round 2/3" in line:
            raise Killed

    with pytest.raises(Killed):
        method(tiny, forget(tiny), retain(tiny), seed=0, work=Work(checkpoint, say=die), watch=watch(tiny))
    said.clear()
    resumed = method(
        tiny, forget(tiny), retain(tiny), seed=0, work=Work(checkpoint, say=said.append), watch=watch(tiny)
    )
    assert resumed.fingerprint == whole.fingerprint and resumed.details == whole.details
    assert len(said) == 1 and "round 3/3" in said[0]
    with pytest.raises(DoriError, match="other settings"):
        method(tiny, forget(tiny), retain(tiny), seed=1, work=Work(checkpoint))
    checkpoint.write_bytes(b"torn")
    with pytest.raises(DoriError, match="cannot be read"):
        method(tiny, forget(tiny), retain(tiny), seed=0, work=Work(checkpoint))


def test_a_round_says_what_is_left_and_the_rows_are_those_that_were_planned(tiny: StableDiffusion) -> None:
    growing = dataclasses.replace(METHOD, attack_growth=2.0, check_every=2, patience=9, search_rounds=2)
    said = list[str]()
    before = tiny.rows
    edit = growing(tiny, forget(tiny), retain(tiny), seed=0, work=Work(say=said.append), watch=watch(tiny, 9.0))
    assert tiny.rows - before == growing.rows(3, watch(tiny)).count == edit.details["rows"]
    assert edit.details["updates"] == growing.rounds * growing.steps_per_round
    rounds = [line for line in said if "round" in line]
    assert all("left" in line for line in rounds[:-1]) and "left" not in rounds[-1] and len(rounds) == 3


def test_a_diverging_training_stops_at_once_and_says_so(tiny: StableDiffusion) -> None:
    said = list[str]()
    wild = dataclasses.replace(METHOD, rounds=50, tuner=Tuner(learning_rate=1e25))
    with pytest.raises(CannotErase, match=r"diverged.*--rate-scale"):
        wild(tiny, forget(tiny), retain(tiny), seed=0, work=Work(say=said.append))
    assert len(said) < 3


def test_only_as_many_surrogates_are_taught_as_wanted(tiny: StableDiffusion) -> None:
    memories = forget(tiny)
    first = dataclasses.replace(memories, surrogates=tuple(images[:1] for images in memories.surrogates))
    one = dataclasses.replace(METHOD, rounds=1, surrogates=1)
    found, same, all_of_them = (
        method(tiny, given, retain(tiny), seed=0).fingerprint
        for method, given in ((one, memories), (one, first), (dataclasses.replace(one, surrogates=None), memories))
    )
    assert found == same != all_of_them


def test_each_round_attacks_the_current_weights(tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    original = Dori.__call__

    def spy(self: Dori, model: StableDiffusion, targets: Tensor, starts: Tensor, **rest: object):  # noqa: ANN202
        assert not any(parameter.requires_grad for parameter in model.unet.parameters())
        seen.append((self.steps, float(model.unet.conv_in.weight.detach().sum()), starts))
        return original(self, model, targets, starts, **rest)

    monkeypatch.setattr(Dori, "__call__", spy)
    growing = dataclasses.replace(METHOD, attack_growth=2.0, attack_limit=5)
    growing(tiny, forget(tiny), retain(tiny), seed=0)
    assert [steps for steps, _, _ in seen] == [2] * 3 + [4] * 3 + [5] * 3  # three kinds of start a round
    assert len({weight for _, weight, _ in seen}) == 3
    assert all(torch.equal(points, forget(tiny).embeddings) for _, _, points in seen[::3])
    assert not torch.equal(seen[1][2], seen[4][2])  # fresh Gaussian starts
    seen.clear()
    dataclasses.replace(METHOD, search_rounds=1)(tiny, forget(tiny), retain(tiny), seed=0)
    assert len(seen) == 3
    seen.clear()
    dataclasses.replace(METHOD, starts=("prompt",), attack=Dori(steps=0))(tiny, forget(tiny), retain(tiny), seed=0)
    assert all(steps == 0 for steps, _, _ in seen)


def test_each_memory_is_asked_by_its_own_triggers_and_prompt(tiny: StableDiffusion) -> None:
    memories, triggers = forget(tiny), draw(2, 3, *tiny.embedding_shape, seed=5)
    generator = torch.Generator().manual_seed(0)
    which, embeddings = lesson(tiny, memories, triggers, [0, 2], batch=400).asked(generator)
    kinds = torch.cat([triggers, memories.embeddings[None]])  # (3, n, l, d)
    count = torch.zeros(3, 3)
    for i, y in zip(which.tolist(), embeddings, strict=True):
        (kind,) = [k for k in range(3) if torch.equal(y, kinds[k, i])]
        count[kind, i] += 1
    assert count.sum(0).tolist() == [200, 0, 200]
    assert bool((abs(count.sum(1) - 400 / 3) < 5 * (400 * 2 / 9) ** 0.5).all())
    without = lesson(tiny, memories, triggers, [1], batch=400, prompt_too=False).asked(generator)[1]
    assert not any(torch.equal(y, memories.embeddings[1]) for y in without)


@pytest.mark.parametrize("kept", [term for term in TERMS if term != "near"])  # alone it has nothing to mend
def test_terms_can_be_left_out(tiny: StableDiffusion, kept: str) -> None:
    weights = {f"{term}_weight": float(term == kept) for term in TERMS}
    one = dataclasses.replace(METHOD, rounds=1, steps_per_round=1, **weights)
    log = one(tiny, forget(tiny), retain(tiny), seed=0).details["log"][0]
    assert [log[term] != 0 for term in TERMS] == [term == kept for term in TERMS]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "tuner", [Tuner(), Tuner(rows_per_call=2, checkpointing=True), Tuner(part="lora")], ids=["full", "parts", "lora"]
)
def test_the_unconditional_term_teaches_the_memory_as_the_model_saw_it_without_a_prompt(
    tmp_path: Path, kind: str, tuner: Tuner
) -> None:
    """Against the formula written out, on weights that have moved; the target does not move with them.

    The last timestep of the velocity model holds no signal, so that nothing may be divided by abar.
    """
    tiny = StableDiffusion(**tiny_parts(tmp_path, kind), name="tiny")
    memories, y = forget(tiny), draw(3, *tiny.embedding_shape, seed=5)
    t, noise, null = torch.tensor([3, 40, 99]), draw(3, *tiny.latent_shape, seed=6), tiny.encode([""])
    if kind == "v_prediction":
        tiny.alphas_cumprod[99] = 0
    a = tiny.alphas_cumprod[t][:, None, None, None]
    noisy = a.sqrt() * memories.latents + (1 - a).sqrt() * noise
    with torch.no_grad():
        before = tiny.unet(noisy, t, null.expand_as(y)).sample
    with tuning(tiny, dataclasses.replace(tuner, learning_rate=1e-2)) as tuned:
        tuned.update([torch.ones_like(weight) for weight in tuned.weights.values()])
        weights = {name: weight.detach().clone() for name, weight in tuned.weights.items()}
        gradient, loss = tuned.gradient(former_losses(tuned, Batch(memories.latents, y, noise, t), null), 3)
        assert all(torch.equal(weight, weights[name]) for name, weight in tuned.weights.items())
        wanted = (tiny.unet(noisy, t, y).sample - before).square().mean()
        slow = torch.autograd.grad(wanted, list(tuned.weights.values()), allow_unused=True)
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        for own, other in zip(gradient, slow, strict=True):
            assert torch.allclose(own, torch.zeros_like(own) if other is None else other, atol=1e-6, rtol=1e-3)
        moved = tiny.unet(noisy, t, null.expand_as(y)).sample
        assert not torch.allclose(moved, before, atol=1e-5)  # or the target might as well be the weights as they are


def test_the_weights_as_before_are_put_off_again_bit_for_bit(tiny: StableDiffusion) -> None:
    base = {name: weight.detach().clone() for name, weight in tiny.unet.named_parameters()}
    with tuning(tiny, Tuner(learning_rate=1e-2)) as tuned:
        tuned.update([torch.ones_like(weight) for weight in tuned.weights.values()])
        moved = {name: weight.detach().clone() for name, weight in tuned.weights.items()}
        with pytest.raises(Killed), tuned.as_before():
            assert not torch.is_grad_enabled()
            assert all(torch.equal(weight, base[name]) for name, weight in tuned.weights.items())
            raise Killed
        assert torch.is_grad_enabled() and all(weight.requires_grad for weight in tuned.weights.values())
        assert all(torch.equal(weight, moved[name]) for name, weight in tuned.weights.items())
        assert not any(torch.equal(moved[name], base[name]) for name in base)
        tuned.update([torch.ones_like(weight) for weight in tuned.weights.values()])
    assert all(torch.equal(weight, base[name]) for name, weight in tiny.unet.named_parameters())


def test_a_memory_without_a_text_is_asked_by_its_triggers_alone(tiny: StableDiffusion) -> None:
    memories, triggers = forget(tiny, texts=("a", None, "b")), draw(2, 3, *tiny.embedding_shape, seed=5)
    big = lesson(tiny, memories, triggers, [0, 1, 2], batch=90)
    which, embeddings = big.asked(torch.Generator().manual_seed(0))
    asked = [any(torch.equal(y, memories.embeddings[i]) for y in embeddings[which == i]) for i in range(3)]
    assert asked == [True, False, True]
    assert all(any(torch.equal(y, triggers[k, 1]) for k in range(2)) for y in embeddings[which == 1])


def test_what_the_model_knows_without_a_prompt_is_its_denoising_error(tiny: StableDiffusion) -> None:
    memories, ordinary, rows = forget(tiny), retain(tiny), tiny.rows
    found = without_prompt(tiny, memories, ordinary, seed=3)
    parts = without_prompt(tiny, memories, ordinary, seed=3, rows_per_call=5)
    assert set(parts) == set(found)
    rows += 2 * 8 * 3
    assert set(found) == {"memories", "ordinary"} and tiny.rows - rows == 2 * 8 * 3
    generator = step_generator("without prompt", 3, 1)
    noise, t = (
        torch.randn(24, *tiny.latent_shape, generator=generator),
        torch.randint(0, tiny.timesteps, (24,), generator=generator),
    )
    with torch.no_grad():
        slow = tiny.denoising_error(memories.latents.repeat(8, 1, 1, 1), noise, t, tiny.encode([""]).expand(24, -1, -1))
    assert found["memories"] == pytest.approx(float(slow.mean()), abs=2e-6)
    same = dataclasses.replace(memories, latents=ordinary.latents[:1].expand(3, -1, -1, -1))
    one = dataclasses.replace(ordinary, latents=ordinary.latents[:1], embeddings=ordinary.embeddings[:1])
    alike = without_prompt(tiny, same, one, seed=3)
    assert alike["memories"] == alike["ordinary"]
    said = list[str]()
    METHOD(tiny, memories, ordinary, seed=0, work=Work(say=said.append))
    assert "without a prompt" in said[0]
    alone = dataclasses.replace(METHOD, unconditional_weight=0.0)  # relapses have the same target
    assert alone(tiny, memories, ordinary, seed=0).details["without_prompt"]
    paper = dataclasses.replace(METHOD, near_weight=1.0).paper()  # its two terms and no other
    assert paper(tiny, memories, ordinary, seed=0).details["without_prompt"] == {}


def test_safe_memories_are_visited_less_often(tiny: StableDiffusion) -> None:
    often = dataclasses.replace(METHOD, rounds=4, steps_per_round=1, safe_every=3)
    safe = often(tiny, forget(tiny), retain(tiny), seed=0, watch=watch(tiny, threshold=5.0)).details["log"]
    assert [record["visited"] for record in safe] == [3, 3, 3, 3]  # all safe alike: none is singled out
    progress_last = torch.tensor([0.1, 0.9, 0.2])
    from dori.erase.adversarial import _Progress

    progress = _Progress(1, 0, 0, progress_last, torch.zeros(0), [], {})
    assert often._visited(progress, watch(tiny)) == [1]
    progress.round = 3
    assert often._visited(progress, watch(tiny)) == [0, 1, 2] == often._visited(progress, None)


def test_it_stops_on_evidence_or_when_the_budget_is_spent(tiny: StableDiffusion) -> None:
    checked = dataclasses.replace(METHOD, rounds=4, steps_per_round=1, check_every=1, patience=2)
    quiet = checked(tiny, forget(tiny), retain(tiny), seed=0, watch=watch(tiny, threshold=2.0)).details["log"]
    assert len(quiet) == 2 and all(record["held_out_replicated"] == 0 for record in quiet)
    loud = checked(tiny, forget(tiny), retain(tiny), seed=0, watch=watch(tiny, threshold=-2.0)).details["log"]
    assert len(loud) == 4 and all(record["held_out_replicated"] == 3 for record in loud)
    rows = loud[0]["rows"]
    spent = dataclasses.replace(checked, budget_rows=rows + 1)(
        tiny, forget(tiny), retain(tiny), seed=0, watch=watch(tiny, threshold=-2.0)
    ).details
    assert len(spent["log"]) == 2 and spent["rows"] == spent["log"][-1]["rows"] == loud[1]["rows"]


def test_held_out_attacks_share_no_stream_with_the_training(tiny: StableDiffusion) -> None:
    judge, memories = watch(tiny), forget(tiny)
    first, again, other = (judge.held_out(tiny, memories, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (3,)
    bare = forget(tiny, texts=("a", None, "b"))
    given = {"texts": bare.texts, "ordinary": bare.ordinary, "seeds": [5, 6, 7]}
    points = starting_points(tiny, "prompt", **given)
    assert torch.equal(points[::2], bare.embeddings[::2])
    assert torch.equal(points[1], starting_points(tiny, "gaussian", **given)[1])
    ordinary = tiny.encode(bare.ordinary)
    foreign = starting_points(tiny, "foreign", **given)
    assert all(any(torch.allclose(row, one, atol=1e-6) for one in ordinary) for row in foreign)


def test_a_template_is_watched_as_it_will_be_judged(tiny: StableDiffusion) -> None:
    plain = watch(tiny)
    box = dataclasses.replace(plain.cases[0].memory, kind="template", varying_box=(2, 2, 9, 9))
    template = dataclasses.replace(plain.cases[0], memory=box)
    masked = dataclasses.replace(
        plain,
        descriptor=dataclasses.replace(plain.descriptor, masked_threshold=0.9),
        cases=(template, *plain.cases[1:]),
    )
    assert plain.limits.tolist() == pytest.approx([0.7] * 3) and masked.limits.tolist() == pytest.approx(
        [0.9, 0.7, 0.7]
    )
    seen = [one.similarities(tiny, forget(tiny).embeddings, [0, 1, 2], seed=0) for one in (plain, masked)]
    assert seen[0][0] != seen[1][0] and torch.equal(seen[0][1:], seen[1][1:])


# ---------------------------------------------------------------------------------------------------------- surrogates


def test_prompts_are_shortened_word_by_word() -> None:
    assert shortened("a b c d e f g h") == ("a b c d e f", "a b c d", "a b", "")
    assert shortened("one two") == ("one", "") and shortened("one") == ("",) and shortened(None) == ("",)
    assert anchor_prompts("a b c d e") == ("a b", "a", "") and anchor_prompts("one") == anchor_prompts(None) == ("",)
    assert anchor_prompts("a b c d e f g h") == ("a b c d", "a b", "")


def test_candidates_are_kept_greedily_if_unlike_target_and_one_another() -> None:
    vectors = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1], [0, -1, 0]]), dim=1
    )
    allowed = torch.tensor([False, True, True, True, True])
    assert filtered(allowed, vectors, vectors[:0], wanted=9, below_each_other=0.7) == [1, 3, 4]
    assert filtered(allowed, vectors, vectors[:0], wanted=2, below_each_other=0.7) == [1, 3]
    assert filtered(allowed, vectors, vectors[1:2], wanted=9, below_each_other=0.7) == [3, 4]


def searched(
    search: SurrogateSearch, model: StableDiffusion, asked: Sequence[Case], judge: Descriptor = DESCRIPTOR
) -> list[Surrogates]:
    """The surrogates of each of the memories; an edit that changes nothing stands for the mitigation."""
    described = judge(torch.stack([case.image for case in asked]))
    others = [torch.cat([described[:row], described[row + 1 :]]) for row in range(len(asked))]
    return [search(model, case, [no_edit()], judge, others=o, seed=0) for case, o in zip(asked, others, strict=True)]


def test_surrogates_come_from_the_mitigated_model_first_and_are_no_copies(tiny: StableDiffusion) -> None:
    asked = cases(tiny)
    search = SurrogateSearch(wanted=2, tries=4, sampling_steps=1, below_target=0.9, below_each_other=1.3)
    given, again = searched(search, tiny, asked), searched(search, tiny, asked)
    for case, found, same in zip(asked, given, again, strict=True):
        assert torch.equal(found.latents, same.latents)
        described = DESCRIPTOR(found.images)
        assert float(cosine(described, DESCRIPTOR(case.image[None])).max()) < 0.9 * 0.7
        assert float((cosine(described[:, None], described) - 2 * torch.eye(len(described))).max()) < 1.3 * 0.7
        assert torch.allclose(found.latents, tiny.to_latents(found.images))
        assert found.sources[0].startswith(("none: ", "shortened prompt")) and len(found.sources) == len(found.images)
    only = searched(dataclasses.replace(search, mitigated=False), tiny, asked)
    assert all(source.startswith("shortened prompt") for found in only for source in found.sources)
    none = searched(dataclasses.replace(search, below_target=-2.0), tiny, asked)
    assert [len(found.latents) for found in none] == [0, 0, 0] and all(-1 <= found.nearest <= 1 for found in none)


def test_a_copy_of_another_memory_is_no_surrogate(tiny: StableDiffusion) -> None:
    search = SurrogateSearch(
        wanted=9, tries=4, sampling_steps=1, below_target=9.0, below_each_other=9.0, mitigated=False
    )
    asked = cases(tiny, 2)
    drawn = searched(search, tiny, asked)[0]
    copied = dataclasses.replace(asked[1], image=drawn.images[0])
    again = searched(search, tiny, (asked[0], copied))[0]
    reference = DESCRIPTOR(copied.image[None])
    likeness = [float(cosine(DESCRIPTOR(found.images), reference).max()) for found in (drawn, again)]
    assert likeness[0] > 0.99 and likeness[1] < DESCRIPTOR.threshold


def test_every_pair_is_compared_as_the_judge_compares_it(tiny: StableDiffusion) -> None:
    """In parts or at once; a template blind to what varies, so that another instance of it is a copy."""
    plain = cases(tiny, 2)
    box = dataclasses.replace(plain[0].memory, kind="template", varying_box=(0, 0, 16, 12))
    asked = (dataclasses.replace(plain[0], memory=box), plain[1])
    judge = dataclasses.replace(DESCRIPTOR, masked_threshold=0.9)
    images = torch.rand(PART + 3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    images[PART + 1, :, 12:] = plain[0].image[:, 12:]  # another instance
    found = deciding_pairs(judge, asked, images)
    for column, case in enumerate(asked):
        assert torch.allclose(found[:, column], deciding(judge, [case], images[None])[0], atol=1e-6)
    assert found[PART + 1, 0] > 0.99 > 0.9 > deciding_pairs(judge, plain, images)[PART + 1, 0]


def test_surrogates_of_templates_are_unlike_what_stays_the_same(tiny: StableDiffusion) -> None:
    case = cases(tiny, 1)[0]
    box = dataclasses.replace(case.memory, kind="template", varying_box=(2, 2, 9, 9))
    template = dataclasses.replace(case, memory=box)
    judge = dataclasses.replace(DESCRIPTOR, masked_threshold=0.9)
    search = SurrogateSearch(wanted=99, tries=8, sampling_steps=1, below_target=0.5, below_each_other=9.0)
    found = searched(search, tiny, [template], judge)[0]
    masked = masked_similarity(judge, found.images, template.image, (2, 2, 9, 9))
    assert len(masked) and float(masked.max()) < 0.45


def test_the_tiny_model_is_the_same_in_every_process(tmp_path: Path) -> None:
    first, second = (StableDiffusion(**tiny_parts(tmp_path), name="tiny") for _ in range(2))
    assert torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)
