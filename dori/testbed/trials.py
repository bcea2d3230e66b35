"""Settings of NeMo and Wanda tried on the testbed: some must hide its memories and leave ordinary prompts alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dori.audit.edits import make_edits
from dori.audit.judge import Case
from dori.edit import WeightMask
from dori.metrics.replication import replication
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import DOWN_MID, EVERYWHERE, StableDiffusion
from dori.run import Run
from dori.testbed import objects
from dori.testbed.bench import Bench, encoded
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

    def __call__(self, key: str, label: str, edit: WeightMask) -> Tried:
        """One setting."""
        rate = replication(self.bench.asked(key, self.model, self.cases, edit=edit),
                           self.bench.descriptor.threshold).rate
        if rate.value > HIDDEN or self.unedited == 0:
            return Tried(label, rate)
        images = self.bench.images(f"{key} objects", self.model, self.model.encode(self.prompts), edit=edit,
                                   seeds=EDITED_SEEDS)
        found = float(objects.finds(self.network, images, prompted(self.prompts)).float().mean())
        return Tried(label, rate, found / self.unedited)


def nemo_trials(trial: Trial, calibration: Tensor) -> tuple[list[Tried], str]:
    """NeMo's settings in order until one works, and what its last search found, in words."""
    tried: list[Tried] = []
    said = ""
    for index, (label, nemo) in enumerate(NEMOS):
        # A folder for each setting: the cells of NeMo's edits bear the memories' names alone.
        run = Run(trial.bench.run.folder / f"nemo-{index}", say=trial.bench.run.say)
        ids = [case.memory.id for case in trial.cases]
        run.plan(f"verify, {label}", {"nemo.calibration": 1000} | {f"nemo.{one}": 1000 for one in ids})
        plan = replace(trial.bench.plan, nemo=nemo, wandas=(), attack_random=False)
        edits = make_edits(trial.model, plan, run, {"model": model_fingerprint(trial.model)}, ids,
                           encoded(trial.model, trial.cases), calibration)
        own, joint = [edit.details for edit in edits.own["NeMo"].values()], edits.joint[1]
        neurons = sum(int(mask.any(dim=1).sum()) for mask in joint.masks.values())
        said = (f"{label}: {sum(d['flagged'] for d in own)} flagged, {sum(d['suppressed'] for d in own)} suppressed, "
                f"{neurons} of {sum(len(mask) for mask in joint.masks.values())} neurons in the union")
        tried.append(trial(label, label, joint))
        if tried[-1].reached:
            break
    return tried, said


def wanda_trials(trial: Trial, calibration: Tensor) -> list[Tried]:
    """The whole sweep of Wanda."""
    plan = replace(trial.bench.plan, nemo=None, wandas=WANDAS, attack_random=False, attack_own=False)
    edits = make_edits(trial.model, plan, trial.bench.run, {"model": model_fingerprint(trial.model)},
                       [case.memory.id for case in trial.cases], encoded(trial.model, trial.cases), calibration)
    return [trial(f"wanda-{index}", edit.name, edit) for index, edit in enumerate(edits.joint[1:])]
