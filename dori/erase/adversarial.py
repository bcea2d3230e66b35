"""Adversarial fine-tuning: search triggers on the current weights, take their image from them, and again.

Source: Finding Dori, methods.md 5: L = L_DM + L_Adv (1 : 1), L_DM the denoising loss on ordinary pairs, and

    L_Adv = || eps - eps_theta(sqrt(abar_t) z_s + sqrt(1 - abar_t) eps, t, y_adv) ||^2,

z_s the latent of a surrogate image, y_adv a trigger that DoRI finds on the weights as they are. Stated there: full
U-Net, fresh triggers before every step, 5 epochs, surrogates from a pruned model. Not stated, chosen here (5.3): AdamW
1e-5, decay 1e-2, clip 1; starts from the prompt, noise and other prompts; triggers reused for `steps_per_round` steps.

The default has another loss in the place of L_Adv, which is not from the paper. L_Adv moves where a trigger's image
begins, but is silent at the noised memory itself, which is where DoRI looks. There the model shall see under a trigger
what it saw before without a prompt:

    L_Unc = || eps_theta(z_t, t, y_adv) - eps_theta0(z_t, t, y_null) ||^2,

z_t the noised latent of the memory, theta0 the model as it was, y_null the empty prompt: ESD's target with eta = 1 as
`esd.py` counts it, at the memory and under triggers. It fits as far as the model does not know the memory without a
prompt, which `without_prompt` measures first. What either loss does to the testbed: docs/erasure.md. `paper()` gives
the paper's loss.

Damage hides near the erased captions. With `near_weight` the erasure holds what the model said there,

    L_Near = || eps_theta(z_t, t, y_near) - eps_theta0(z_t, t, y_near) ||^2,

y_near a caption with one word exchanged, z_t the noised image that the model as it was drew from it
(`dori.erase.neighbours`: none that shows a memory).

An image that no embedding reaches may still be relearned sooner than an unseen one. With `relapse_weight` L_Unc is
asked a second time on weights theta + delta that learned the memories again (`dori.erase.relapse`), there under the
plain prompts.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.plan import Start
from dori.cost import Rows
from dori.erase.course import load_state, store_state
from dori.erase.delta import WeightDelta, making
from dori.erase.pairs import Forget, Pairs, Work, step_generator
from dori.erase.relapse import Relapse
from dori.erase.starts import starting_points
from dori.erase.terms import TERMS, Lesson
from dori.erase.tuning import Tuned, Tuner, tuning
from dori.erase.unprompted import NOISES, without_prompt
from dori.erase.watch import Watch
from dori.model.stable_diffusion import StableDiffusion
from dori.progress import duration
from dori.run import canonical_sha256, tensors_sha256
from dori.sampling import named_seed

NEVER = -1.0  # similarity of a memory whose trigger was not yet looked at


@dataclass(slots=True)
class _Progress:
    """Where an erasure stands; with the weights' state all that the next round depends on.

    Args:
        round: rounds done.
        quiet: held-out attacks in a row in which no memory came back.
        rows: U-Net rows so far.
        last: of each memory, what its trigger drew when it was looked at last, shape (n,).
        triggers: of each start and memory, shape (s, n, l, d).
        log: one record a round.
        without_prompt: what `without_prompt` found; empty where it was not asked.
    """

    round: int
    quiet: int
    rows: int
    last: Tensor
    triggers: Tensor
    log: list[dict[str, Any]]
    without_prompt: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What stays the same over all rounds."""

    tuned: Tuned
    memories: Forget
    retain: Pairs
    seed: int
    work: Work
    watch: Watch | None

    @property
    def model(self) -> StableDiffusion:
        """The model in training."""
        return self.tuned.model


@dataclass(frozen=True, slots=True)
class AdversarialErasure:
    """L_DM and L_Unc under fresh triggers, or the paper's L_DM and L_Adv; knobs that save cost, arms that change parts.

    Args:
        rounds: at most so many searches of triggers.
        steps_per_round: updates with the same triggers; 1 is the paper's.
        batch: rows of each term in each update.
        attack: DoRI as it searches; `Dori(steps=0)` leaves the starts as they are (prompt-only arm).
        attack_growth: the attack's steps grow by this factor a round, up to `attack_limit`.
        attack_limit: largest number of attack steps; fewer than the proof's, which nothing may be trained against.
        starts: where triggers begin; each memory gets one of each kind.
        search_rounds: rounds that search; later ones keep the triggers found; None searches in all.
        prompt_too: teach the plain prompt as well as its triggers.
        surrogates: of each memory, at most so many are taught; None takes all.
        retain_weight: of L_DM; 0 leaves it out.
        adversarial_weight: of L_Adv; 1 is the paper's, and 0 needs no surrogates.
        unconditional_weight: of L_Unc; 0 is the paper's.
        near_weight: of L_Near; 0 leaves it out.
        relapse_weight: of L_Unc on relapsed weights; 0 leaves it out.
        relapse: how those are found.
        safe_every: a memory whose last trigger drew nothing like it is attacked every so many rounds; 1 is always.
        safe_below: "nothing like it" is a similarity below this share of the threshold that decides.
        check_every: rounds between two held-out attacks; 0 makes none.
        patience: held-out attacks in a row without a replication after which the erasure ends.
        budget_rows: the erasure ends after the round in which its U-Net rows pass this; None has no bound.
        tuner: how weights move.
    """

    rounds: int = 5
    steps_per_round: int = 25
    batch: int = 16
    attack: Dori = field(default_factory=Dori)
    attack_growth: float = 1.0
    attack_limit: int = 100
    starts: tuple[Start, ...] = ("prompt", "gaussian", "foreign")
    search_rounds: int | None = None
    prompt_too: bool = True
    surrogates: int | None = None
    retain_weight: float = 1.0
    adversarial_weight: float = 0.0
    unconditional_weight: float = 1.0
    near_weight: float = 0.0
    relapse_weight: float = 0.0
    relapse: Relapse = field(default_factory=Relapse)
    safe_every: int = 1
    safe_below: float = 0.7
    check_every: int = 0
    patience: int = 2
    budget_rows: int | None = None
    tuner: Tuner = field(default_factory=Tuner)

    @property
    def needs_surrogates(self) -> bool:
        """Whether L_Adv has a weight."""
        return self.adversarial_weight != 0

    @property
    def _asks_without_prompt(self) -> bool:
        """Whether a term's target is the prediction without a prompt."""
        return self.unconditional_weight != 0 or self.relapse_weight != 0

    def paper(self) -> "AdversarialErasure":
        """The same with the paper's loss, L_DM + L_Adv."""
        return dataclasses.replace(
            self, adversarial_weight=1.0, unconditional_weight=0.0, near_weight=0.0, relapse_weight=0.0
        )

    def against_relapses(self) -> "AdversarialErasure":
        """The same with L_Rel; since that costs the rest of the model, L_DM is heavier and neighbours are held."""
        return dataclasses.replace(self, relapse_weight=1.0, retain_weight=3.0, near_weight=1.0)

    def __call__(
        self,
        model: StableDiffusion,
        memories: Forget,
        retain: Pairs,
        *,
        seed: int,
        work: Work | None = None,
        watch: Watch | None = None,
    ) -> WeightDelta:
        """Erase the memories; the model itself is left as it was.

        Args:
            model: the model, in float32.
            memories: what to erase, with surrogates where L_Adv weighs.
            retain: ordinary pairs.
            seed: root of all random streams.
            work: checkpoint, processes, progress.
            watch: judge of progress; without one every memory is visited in every round and nothing stops early.

        Raises:
            CannotErase: a memory has no surrogate although L_Adv weighs, there is no neighbour although L_Near does, or
                training diverged.
            DoriError: the checkpoint belongs to another erasure.
        """
        if self.needs_surrogates:
            memories.need_surrogates("adversarial fine-tuning")
        if self.near_weight:
            memories.need_near()
        memories = dataclasses.replace(
            memories, surrogates=tuple(images[: self.surrogates] for images in memories.surrogates)
        )
        work = work or Work()
        made_from = self._made_from(model, memories, retain, seed)
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            task = _Task(tuned, memories, retain, seed, work, watch)
            progress = self._resumed(task, made_from)
            first, began = progress.round, time.monotonic()
            while progress.round < self.rounds and not self._over(progress):
                before = model.rows
                record = self._round(task, progress)
                progress.round += 1
                spent = torch.tensor(model.rows - before, device=model.device)
                progress.rows += int(work.processes.sum([spent])[0])  # the same everywhere, so that all stop together
                progress.log.append(record | {"rows": progress.rows})
                if work.checkpoint is not None and work.processes.first:
                    _store(work.checkpoint, tuned, progress, made_from)
                work.say(self._line(task, progress, first=first, took_s=time.monotonic() - began))
            made = making(self, seed=seed, rows=progress.rows, updates=tuned.steps, log=progress.log)
            return tuned.edit("adversarial fine-tuning", made | {"without_prompt": progress.without_prompt})

    def _made_from(self, model: StableDiffusion, memories: Forget, retain: Pairs, seed: int) -> str:
        """Names all that the weights depend on."""
        taught = {str(i): kept for i, kept in enumerate(memories.surrogates)}
        return canonical_sha256(
            {
                "method": dataclasses.asdict(self),
                "seed": seed,
                "memories": [memories.source, memories.ids, memories.texts, memories.ordinary],
                "surrogates": tensors_sha256(taught),
                "near": memories.near.source if memories.near and self.near_weight else "",
                "retain": retain.source,
                "model": tensors_sha256(model.unet.state_dict()),
            }
        )

    # ----------------------------------------------------------------------------------------------------- its cost

    def rows(self, memories: int, watch: Watch | None = None) -> Rows:
        """At most so many U-Net rows: all rounds are made, and no memory is ever safe."""
        first = Rows(2 * NOISES * memories * self._asks_without_prompt)
        return sum((self._round_rows(number, memories, watch) for number in range(self.rounds)), first)

    def _round_rows(self, number: int, memories: int, watch: Watch | None) -> Rows:
        rows, terms = self.steps_per_round * self.batch, sum(weight != 0 for weight in self._weights().values())
        asked = (self.unconditional_weight, self.near_weight, self.relapse_weight)  # terms that ask the model as it was
        found = Rows(rows * sum(weight != 0 for weight in asked), trained=rows * terms)
        if self.relapse_weight:
            found += self.relapse.rows(self.steps_per_round, self.batch)
        triggers = len(self.starts) * memories
        if self._searches(number):
            found += Rows(attacked=triggers * self._attack(number).steps * self.attack.batch)
            found += watch.look_rows(triggers) if watch is not None else Rows()
        return found + (watch.held_out_rows(memories) if watch is not None and self._checks(number) else Rows())

    # ------------------------------------------------------------------------------------------------------ a round

    def _weights(self) -> dict[str, float]:
        """Of each term."""
        return {name: getattr(self, f"{name}_weight") for name in TERMS}

    def _searches(self, number: int) -> bool:
        return self.search_rounds is None or number < self.search_rounds

    def _checks(self, number: int) -> bool:
        return self.check_every > 0 and (number + 1) % self.check_every == 0

    def _round(self, task: _Task, progress: _Progress) -> dict[str, Any]:
        number, watch = progress.round, task.watch
        visited = self._visited(progress, watch)
        if self._searches(number):
            with task.tuned.resting():
                self._search(task, progress, visited)
            if watch is not None:
                self._look(task, watch, progress, visited)
        lesson = Lesson(task.tuned, task.memories, task.retain, progress.triggers, visited, self.batch, self.prompt_too)
        steps = range(number * self.steps_per_round, (number + 1) * self.steps_per_round)
        losses, change = dict[str, float](), dict[str, Tensor]()
        for step in steps:
            if self.relapse_weight and (step - steps.start) % self.relapse.every == 0:
                change = self.relapse(task.tuned, task.memories, self.batch, seed=task.seed, step=step)
            losses = self._step(lesson, change, step_generator("adversarial", task.seed, step))
        record: dict[str, Any] = {
            "round": number + 1,
            "visited": len(visited),
            "attack_steps": self._attack(number).steps,
            **losses,
        }
        if watch is not None:
            record["triggers_reached"] = [round(value, 4) for value in progress.last.tolist()]
        if watch is not None and self._checks(number):
            with task.tuned.resulting(), task.tuned.resting():
                reached = watch.held_out(task.model, task.memories, seed=named_seed("check", task.seed, number))
            reached = task.work.processes.of_first(reached.to(task.model.device)).cpu()
            replicated = int((reached > watch.limits).sum())
            progress.quiet = 0 if replicated else progress.quiet + 1
            record |= {"held_out": [round(value, 4) for value in reached.tolist()], "held_out_replicated": replicated}
        return record

    def _visited(self, progress: _Progress, watch: Watch | None) -> list[int]:
        """Memories of this round: all, or those that are not safe yet and, now and then, the safe ones."""
        everyone = list(range(len(progress.last)))
        if watch is None or self.safe_every <= 1 or progress.round % self.safe_every == 0:
            return everyone
        below = self.safe_below * watch.limits
        unsafe = [i for i in everyone if not NEVER < float(progress.last[i]) < float(below[i])]
        return unsafe or everyone

    def _attack(self, number: int) -> Dori:
        steps = self.attack.steps
        if steps:
            steps = max(steps, min(self.attack_limit, round(steps * self.attack_growth**number)))
        return dataclasses.replace(self.attack, steps=steps, snapshots=())

    def _search(self, task: _Task, progress: _Progress, visited: Sequence[int]) -> None:
        """Fresh triggers for the visited memories, each process searching its share."""
        memories, attack, number = task.memories, self._attack(progress.round), progress.round
        cells = [(s, i) for s in range(len(self.starts)) for i in visited]
        mine = task.work.processes.share(len(cells)).tolist()
        found = torch.zeros(len(cells), *memories.embeddings.shape[1:])
        seeds = [named_seed("trigger", task.seed, number, self.starts[s], memories.ids[i]) for s, i in cells]
        for s, start in enumerate(self.starts):
            rows = [row for row in mine if cells[row][0] == s]
            if not rows:
                continue
            which, own = [cells[row][1] for row in rows], [seeds[row] for row in rows]
            texts = [memories.texts[i] for i in which]
            points = starting_points(task.model, start, texts=texts, ordinary=memories.ordinary, seeds=own)
            found[rows] = attack(task.model, memories.latents[which].float(), points, seeds=own).at(attack.steps)
        (found,) = task.work.processes.sum([found.to(task.model.device)])
        for row, (s, i) in enumerate(cells):
            progress.triggers[s, i] = found[row].cpu()

    def _look(self, task: _Task, watch: Watch, progress: _Progress, visited: Sequence[int]) -> None:
        """What the new triggers draw: the largest similarity over the starts, memory by memory."""
        which, seed = list(visited), named_seed("look", task.seed, progress.round)
        found = [watch.similarities(task.model, triggers[which], which, seed=seed) for triggers in progress.triggers]
        reached = torch.stack(found).amax(0).to(task.model.device)
        progress.last[which] = task.work.processes.of_first(reached).cpu()

    def _step(self, lesson: Lesson, change: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, float]:
        """One update on L, `change` leading to the relapsed weights; returns each term's loss, 0 if it is left out."""
        tuned = lesson.tuned
        total, losses = [torch.zeros_like(weight) for weight in tuned.weights.values()], dict[str, float]()
        for name, weight in self._weights().items():
            losses[name] = 0.0
            if weight:
                with tuned.moved(change if name == "relapse" else {}):
                    gradient, losses[name] = tuned.gradient(TERMS[name](lesson, generator), self.batch)
                for sum_, part in zip(total, gradient, strict=True):
                    sum_.add_(part, alpha=weight)
        tuned.update(total)
        return losses

    # -------------------------------------------------------------------------------------------------- end, resume

    def _over(self, progress: _Progress) -> bool:
        spent = progress.round > 0 and self.budget_rows is not None and progress.rows >= self.budget_rows
        return spent or (self.check_every > 0 and progress.quiet >= self.patience)

    def _line(self, task: _Task, progress: _Progress, *, first: int, took_s: float) -> str:
        record = progress.log[-1]
        held = f", held-out attack: {record['held_out_replicated']} replicated" if "held_out" in record else ""
        costs = [self._round_rows(number, len(task.memories), task.watch).weight for number in range(self.rounds)]
        done, left = sum(costs[first : progress.round]), sum(costs[progress.round :])
        remaining = f", at most about {duration(took_s * left / done)} left" if left and done else ""
        losses = ", ".join(f"{name} {record[name]:.4f}" for name, weight in self._weights().items() if weight)
        return (
            f"erasing: round {progress.round}/{self.rounds}, losses: {losses}{held}, {progress.rows} U-Net "
            f"rows{remaining}"
        )

    def _resumed(self, task: _Task, made_from: str) -> _Progress:
        task.work.processes.wait()
        if task.work.checkpoint is not None and task.work.checkpoint.exists():
            return _load(task.work.checkpoint, task.tuned, made_from)
        memories, model, found = task.memories, task.model, dict[str, float]()
        before = model.rows
        if self._asks_without_prompt:
            per_call = self.tuner.rows_per_call
            with task.tuned.resting():
                found = without_prompt(model, memories, task.retain, seed=task.seed, rows_per_call=per_call)
            task.work.say(
                f"without a prompt the model's denoising error on the memories is {found['memories']:.3f}, on ordinary "
                f"images {found['ordinary']:.3f}"
            )
        spent = torch.tensor(model.rows - before, device=model.device)
        triggers = memories.embeddings.float().repeat(len(self.starts), 1, 1, 1)
        unseen = torch.full((len(memories),), NEVER)
        return _Progress(0, 0, int(task.work.processes.sum([spent])[0]), unseen, triggers, [], found)


def _store(path: Path, tuned: Tuned, progress: _Progress, made_from: str) -> None:
    header = {
        "made_from": made_from,
        "round": progress.round,
        "quiet": progress.quiet,
        "rows": progress.rows,
        "log": progress.log,
        "without_prompt": progress.without_prompt,
    }
    store_state(path, tuned, header, {"last": progress.last, "triggers": progress.triggers})


def _load(path: Path, tuned: Tuned, made_from: str) -> _Progress:
    header, tensors = load_state(path, tuned, made_from)
    return _Progress(
        header["round"],
        header["quiet"],
        header["rows"],
        tensors["last"],
        tensors["triggers"],
        header["log"],
        header["without_prompt"],
    )
