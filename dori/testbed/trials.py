"""Settings of NeMo and Wanda tried on the testbed: some must hide its memories and leave ordinary prompts alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dori.audit.edits import edit_cells, make_edits, wanda_name
from dori.audit.judge import Case
from dori.edit import Edit, union
from dori.metrics.replication import replication
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import DOWN_MID, EVERYWHERE, StableDiffusion
from dori.run import Run
from dori.testbed import objects
from dori.testbed.bench import Bench
from dori.testbed.promises import HIDDEN, Tried

EDITED_SEEDS = 2  # images of each ordinary prompt under an edit
SPARSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
WANDAS = tuple(Wanda(sparsity=s, places=places) for places in (DOWN_MID, EVERYWHERE) for s in SPARSITIES)
# Tried in this order until one works. Without refinement the whole selection stays blocked.
NEMOS = (
    ("NeMo", Nemo(max_refinement_passes=100)),
    ("NeMo by prompt difference", Nemo(similarity="prompt_difference", max_refinement_passes=50)),
    ("NeMo without refinement", Nemo(max_refinement_passes=0)),
    ("NeMo by prompt difference without refinement", Nemo(similarity="prompt_difference", max_refinement_passes=0)),
)


def prompted(prompts: Sequence[str]) -> list[int]:
    """The kind that each caption names."""
    found = [objects.prompted_kind(prompt) for prompt in prompts]
    assert None not in found, "a caption of the testbed names no object"
    return [kind for kind in found if kind is not None]


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Tries a mitigation's settings on memories, and on ordinary prompts where the memories are hidden."""

    bench: Bench
    model: StableDiffusion
    cases: tuple[Case, ...]
    prompts: tuple[str, ...]
    network: objects.ObjectNetwork
    unedited: float

    @property
    def texts(self) -> dict[str, str]:
        """The memories' prompts by id."""
        return {case.memory.id: case.memory.text or "" for case in self.cases}

    def __call__(self, key: str, label: str, edit: Edit) -> Tried:
        """One setting."""
        rate = replication(
            self.bench.asked(key, self.model, self.cases, edit=edit), self.bench.descriptor.threshold
        ).rate
        if rate.value > HIDDEN or self.unedited == 0:
            return Tried(label, rate)
        images = self.bench.images(
            f"{key} objects",
            self.model,
            self.model.encode(self.prompts),
            made_from=list(self.prompts),
            edit=edit,
            seeds=EDITED_SEEDS,
        )
        found = float(objects.finds(self.network, images, prompted(self.prompts)).float().mean())
        return Tried(label, rate, found / self.unedited)


def nemo_trials(trial: Trial, calibration: Sequence[str]) -> tuple[list[Tried], str]:
    """NeMo's settings in order until one works, and what its last search found, in words."""
    tried: list[Tried] = []
    said = ""
    for index, (label, nemo) in enumerate(NEMOS):
        # A folder for each setting: the cells of NeMo's edits bear the memories' names alone.
        run = Run(trial.bench.run.folder / f"nemo-{index}", say=trial.bench.run.say, modules=trial.bench.run.modules)
        plan = replace(trial.bench.plan, nemo=nemo, wandas=())
        run.plan(f"verify, {label}", edit_cells(trial.model, plan, list(trial.texts), len(calibration)))
        edits = make_edits(
            trial.model,
            plan,
            run,
            base={"model": model_fingerprint(trial.model)},
            prompts=trial.texts,
            ordinary=calibration,
        )
        own = edits.own["NeMo"]
        joint = union("NeMo", list(own.values()))
        details = [edit.details for edit in own.values()]
        neurons = sum(int(mask.any(dim=1).sum()) for mask in joint.masks.values())
        said = (
            f"{label}: {sum(d['flagged'] for d in details)} flagged, "
            f"{sum(d['suppressed'] for d in details)} suppressed, "
            f"{neurons} of {sum(len(mask) for mask in joint.masks.values())} neurons in the union"
        )
        tried.append(trial(label, label, joint))
        if tried[-1].reached:
            break
    return tried, said


def wanda_trials(trial: Trial) -> list[Tried]:
    """The whole sweep of Wanda."""
    plan = replace(trial.bench.plan, nemo=None, wandas=WANDAS)
    edits = make_edits(
        trial.model,
        plan,
        trial.bench.run,
        base={"model": model_fingerprint(trial.model)},
        prompts=trial.texts,
        ordinary=(),
    )
    names = [wanda_name(wanda) for wanda in WANDAS]
    return [trial(f"wanda-{index}", name, edits.joint[name]) for index, name in enumerate(names)]
