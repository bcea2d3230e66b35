"""Adversarial fine-tuning: search triggers on the current weights, teach them surrogate images, and again.

Source: Finding Dori, methods.md 5: L = L_DM + L_Adv (1 : 1), L_DM the denoising loss on ordinary pairs, and

    L_Adv = || eps - eps_theta(sqrt(abar_t) z_s + sqrt(1 - abar_t) eps, t, y_adv) ||^2,

z_s the latent of a surrogate image, y_adv a trigger that DoRI finds on the weights as they are. Stated there: full
U-Net, fresh triggers before every step, 5 epochs, surrogates from a pruned model. Not stated, chosen here (5.3): AdamW
1e-5, decay 1e-2, clip 1; starts from the prompt, noise and other prompts; triggers reused for `steps_per_round` steps.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dori.attack.dori import Dori
from dori.audit.plan import Start
from dori.erase.delta import WeightDelta, making
from dori.erase.pairs import (
    Forget,
    Pairs,
    Work,
    denoising_losses,
    even_rows,
    noised,
    ordinary_batch,
    step_generator,
    surrogate_pairs,
)
from dori.erase.tuning import Tuned, Tuner, tuning
from dori.erase.watch import Watch, starting_points
from dori.errors import DoriError
from dori.model.stable_diffusion import StableDiffusion
from dori.run import canonical_sha256, tensors_sha256, write_bytes
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
    """

    round: int
    quiet: int
    rows: int
    last: Tensor
    triggers: Tensor
    log: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class AdversarialErasure:
    """The paper's erasure, with knobs that save cost and arms that take parts away.

    Args:
        rounds: at most so many searches of triggers.
        steps_per_round: updates with the same triggers; 1 is the paper's.
        batch: rows of L_Adv in each update, and as many of L_DM.
        attack: DoRI as it searches; `Dori(steps=0)` leaves the starts as they are (prompt-only arm).
        attack_growth: the attack's steps grow by this factor a round, up to `attack_limit`.
        attack_limit: largest number of attack steps.
        starts: where triggers begin; each memory gets one of each kind.
        search_rounds: rounds that search; later ones keep the triggers found; None searches in all.
        prompt_too: teach the plain prompt as well as its triggers.
        retain_weight: of L_DM; 0 leaves it out.
        adversarial_weight: of L_Adv.
        safe_every: a memory whose last trigger drew nothing like it is attacked every so many rounds; 1 is always.
        safe_below: "nothing like it" is a similarity below this share of the descriptor's threshold.
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
    attack_limit: int = 150
    starts: tuple[Start, ...] = ("prompt", "gaussian", "foreign")
    search_rounds: int | None = None
    prompt_too: bool = True
    retain_weight: float = 1.0
    adversarial_weight: float = 1.0
    safe_every: int = 1
    safe_below: float = 0.7
    check_every: int = 0
    patience: int = 2
    budget_rows: int | None = None
    tuner: Tuner = field(default_factory=Tuner)

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
            memories: what to erase, with surrogates.
            retain: ordinary pairs.
            seed: root of all random streams.
            work: checkpoint, processes, progress.
            watch: judge of progress; without one every memory is visited in every round and nothing stops early.

        Raises:
            DoriError: a memory has no surrogate, the checkpoint belongs to another erasure, or training diverged.
        """
        memories.need_surrogates("adversarial fine-tuning")
        work = work or Work()
        made_from = canonical_sha256(
            {
                "method": dataclasses.asdict(self),
                "seed": seed,
                "memories": tensors_sha256(
                    {
                        "z": memories.latents,
                        "y": memories.embeddings,
                        "o": memories.ordinary,
                        **{f"s{i}": kept for i, kept in enumerate(memories.surrogates)},
                    }
                ),
                "retain": tensors_sha256({"z": retain.latents, "y": retain.embeddings}),
                "model": tensors_sha256(model.unet.state_dict()),
            }
        )
        with tuning(model, self.tuner, seed=seed, processes=work.processes) as tuned:
            progress = self._resumed(tuned, memories, work, made_from)
            while progress.round < self.rounds and not self._over(progress):
                before = model.rows
                record = self._round(tuned, memories, retain, progress, seed, work, watch)
                progress.round += 1
                spent = torch.tensor(model.rows - before, device=model.device)
                progress.rows += int(work.processes.sum([spent])[0])  # the same everywhere, so that all stop together
                progress.log.append(record | {"rows": progress.rows})
                if work.checkpoint is not None and work.processes.first:
                    _store(work.checkpoint, tuned, progress, made_from)
                work.say(self._line(progress))
            return tuned.edit("adversarial fine-tuning", making(self, seed=seed, rows=progress.rows, log=progress.log))

    # ------------------------------------------------------------------------------------------------------ a round

    def _round(
        self,
        tuned: Tuned,
        memories: Forget,
        retain: Pairs,
        progress: _Progress,
        seed: int,
        work: Work,
        watch: Watch | None,
    ) -> dict[str, Any]:
        number = progress.round
        visited = self._visited(progress, watch)
        if self.search_rounds is None or number < self.search_rounds:
            self._search(tuned, memories, progress, visited, seed, work)
            if watch is not None:
                self._look(tuned.model, memories, progress, visited, seed, watch)
        losses = [
            self._step(
                tuned,
                memories,
                retain,
                progress.triggers,
                visited,
                step_generator("adversarial", seed, number * self.steps_per_round + step),
            )
            for step in range(self.steps_per_round)
        ]
        record: dict[str, Any] = {
            "round": number + 1,
            "visited": len(visited),
            "attack_steps": self._attack(number).steps,
            "retain": losses[-1][0],
            "adversarial": losses[-1][1],
        }
        if watch is not None:
            record["triggers_reached"] = [round(value, 4) for value in progress.last.tolist()]
        if watch is not None and self.check_every and (number + 1) % self.check_every == 0:
            with tuned.resulting():
                reached = watch.held_out(tuned.model, memories, seed=named_seed("check", seed, number))
            replicated = int((reached > watch.descriptor.threshold).sum())
            progress.quiet = 0 if replicated else progress.quiet + 1
            record |= {"held_out": [round(value, 4) for value in reached.tolist()], "held_out_replicated": replicated}
        return record

    def _visited(self, progress: _Progress, watch: Watch | None) -> list[int]:
        """Memories of this round: all, or those that are not safe yet and, now and then, the safe ones."""
        everyone = list(range(len(progress.last)))
        if watch is None or self.safe_every <= 1 or progress.round % self.safe_every == 0:
            return everyone
        limit = self.safe_below * watch.descriptor.threshold
        unsafe = [i for i in everyone if not NEVER < float(progress.last[i]) < limit]
        return unsafe or everyone

    def _attack(self, number: int) -> Dori:
        steps = self.attack.steps
        if steps:
            steps = max(steps, min(self.attack_limit, round(steps * self.attack_growth**number)))
        return dataclasses.replace(self.attack, steps=steps, snapshots=())

    def _search(
        self, tuned: Tuned, memories: Forget, progress: _Progress, visited: Sequence[int], seed: int, work: Work
    ) -> None:
        """Fresh triggers for the visited memories, each process searching its share."""
        model, attack, number = tuned.model, self._attack(progress.round), progress.round
        cells = [(s, i) for s in range(len(self.starts)) for i in visited]
        mine = work.processes.share(len(cells)).tolist()
        found = torch.zeros(len(cells), *memories.embeddings.shape[1:])
        seeds = [named_seed("trigger", seed, number, self.starts[s], memories.ids[i]) for s, i in cells]
        for s in range(len(self.starts)):
            rows = [row for row in mine if cells[row][0] == s]
            if not rows:
                continue
            which, own = [cells[row][1] for row in rows], [seeds[row] for row in rows]
            points = starting_points(model, memories, which, self.starts[s], seeds=own)
            found[rows] = attack(model, memories.latents[which].float(), points, seeds=own).at(attack.steps).float()
        (found,) = work.processes.sum([found.to(model.device)])
        for row, (s, i) in enumerate(cells):
            progress.triggers[s, i] = found[row].cpu()

    def _look(
        self,
        model: StableDiffusion,
        memories: Forget,
        progress: _Progress,
        visited: Sequence[int],
        seed: int,
        watch: Watch,
    ) -> None:
        """What the new triggers draw: the largest similarity over the starts, memory by memory."""
        reached = torch.stack(
            [
                watch.similarities(
                    model, progress.triggers[s, list(visited)], visited, seed=named_seed("look", seed, progress.round)
                )
                for s in range(len(self.starts))
            ]
        )
        progress.last[list(visited)] = reached.amax(0)

    def _step(
        self,
        tuned: Tuned,
        memories: Forget,
        retain: Pairs,
        triggers: Tensor,
        visited: Sequence[int],
        generator: torch.Generator,
    ) -> tuple[float, float]:
        """One update on L; returns both losses."""
        model = tuned.model
        total, losses = None, [0.0, 0.0]
        if self.adversarial_weight:
            latents, embeddings = self._adversarial_rows(memories, triggers, visited, generator)
            batch = noised(model, latents, embeddings, generator)
            gradient, losses[1] = tuned.gradient(denoising_losses(model, batch), len(batch))
            total = [self.adversarial_weight * g for g in gradient]
        if self.retain_weight:
            batch = ordinary_batch(model, retain, self.batch, generator)
            gradient, losses[0] = tuned.gradient(denoising_losses(model, batch), len(batch))
            weighted = [self.retain_weight * g for g in gradient]
            total = weighted if total is None else [a + b for a, b in zip(total, weighted, strict=True)]
        if total is not None:
            tuned.update(total)
        return losses[0], losses[1]

    def _adversarial_rows(
        self, memories: Forget, triggers: Tensor, visited: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Surrogate latents and triggers: memories as even as possible, a trigger of each drawn at random."""
        which = torch.tensor(list(visited))[even_rows(len(visited), self.batch, generator)]
        kinds = torch.randint(len(triggers) + self.prompt_too, (self.batch,), generator=generator)
        latents, prompts = surrogate_pairs(memories, memories.embeddings, which, generator)
        found = triggers[kinds.clamp(max=len(triggers) - 1), which]
        return latents, torch.where((kinds == len(triggers))[:, None, None], prompts, found)

    # -------------------------------------------------------------------------------------------------- end, resume

    def _over(self, progress: _Progress) -> bool:
        spent = self.budget_rows is not None and progress.rows >= self.budget_rows
        return spent or (self.check_every > 0 and progress.quiet >= self.patience)

    def _line(self, progress: _Progress) -> str:
        record = progress.log[-1]
        held = f", held-out attack: {record['held_out_replicated']} replicated" if "held_out" in record else ""
        return (
            f"erasing: round {progress.round}/{self.rounds}, loss {record['retain']:.4f} + "
            f"{record['adversarial']:.4f}{held}, {progress.rows} U-Net rows"
        )

    def _resumed(self, tuned: Tuned, memories: Forget, work: Work, made_from: str) -> _Progress:
        work.processes.wait()
        if work.checkpoint is not None and work.checkpoint.exists():
            return _load(work.checkpoint, tuned, made_from)
        return _Progress(
            0,
            0,
            0,
            torch.full((len(memories),), NEVER),
            memories.embeddings.float().repeat(len(self.starts), 1, 1, 1),
            [],
        )


def _store(path: Path, tuned: Tuned, progress: _Progress, made_from: str) -> None:
    tensors = {f"state.{name}": value.cpu().contiguous() for name, value in tuned.state().items()}
    tensors |= {"last": progress.last, "triggers": progress.triggers.contiguous()}
    header = {
        "made_from": made_from,
        "round": progress.round,
        "quiet": progress.quiet,
        "rows": progress.rows,
        "log": progress.log,
    }
    write_bytes(path, save(tensors, metadata={"erasure": json.dumps(header)}))


def _load(path: Path, tuned: Tuned, made_from: str) -> _Progress:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("erasure", "{}"))
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise DoriError(f"the state {path} of the erasure cannot be read ({error}); delete it to begin anew") from None
    if header.get("made_from") != made_from:
        raise DoriError(
            f"the state {path} belongs to an erasure with other settings, images or weights; delete it to "
            "begin anew, or name another folder"
        )
    tuned.restore({key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")})
    return _Progress(
        header["round"], header["quiet"], header["rows"], tensors["last"], tensors["triggers"], header["log"]
    )
