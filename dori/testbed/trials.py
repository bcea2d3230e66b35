"""Settings of NeMo and Wanda tried on the testbed: some must hide its memories and leave ordinary prompts alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dori.audit.edits import Edits, edit_cells, make_edits, nemo_name, wanda_name
from dori.audit.judge import Case
from dori.audit.plan import Plan
from dori.edit import Edit, union
from dori.metrics.replication import replication
from dori.mitigate.nemo import Nemo
from dori.mitigate.wanda import Wanda
from dori.model.load import model_fingerprint
from dori.model.stable_diffusion import DOWN_MID, EVERYWHERE, StableDiffusion
from dori.run import Run, cell_key
from dori.testbed import objects
from dori.testbed.bench import Bench
from dori.testbed.promises import HIDDEN, Tried

EDITED_SEEDS = 2  # images of each ordinary prompt under an edit
SPARSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# What is not above the score of the empty prompt is never pruned, so that from some sparsity on nothing is added; plain
# Wanda has no such rule.
WANDAS = (
    *(Wanda(sparsity=s, places=places) for places in (DOWN_MID, EVERYWHERE) for s in SPARSITIES),
    *(Wanda(sparsity=s, selection="top") for s in (0.3, 0.4, 0.5)),
    *(Wanda(sparsity=s, site="attention_value") for s in (0.1, 0.2, 0.3)),
)
# Tried in this order until one works, as one joint edit and as each memory's own. Without refinement the whole
# selection stays blocked.
NEMOS = (
    Nemo(max_refinement_passes=100),
    *(Nemo(tau_stds=stds, max_refinement_passes=0) for stds in (1.0, -1.0, -2.0, -3.0)),
)
JOINT, OWN = "jointly", "each its own"


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

    def __call__(self, key: str, label: str, edits: Sequence[Edit]) -> Tried:
        """One setting, as one joint edit or as one for each memory; ordinary prompts are dealt out among the edits."""
        asked: dict[str, Sequence[float]] = {}
        for index, edit in enumerate(edits):
            own = self.cases[index :: len(edits)]
            asked |= self.bench.asked(f"{key} {index}", self.model, own, edit=edit)
        rate = replication(asked, self.bench.descriptor.threshold).rate
        if rate.value > HIDDEN or self.unedited == 0:
            return Tried(label, rate)
        found = torch.cat([self._found(f"{key} objects {index}", edits, index) for index in range(len(edits))])
        return Tried(label, rate, float(found.float().mean()) / self.unedited)

    def _found(self, key: str, edits: Sequence[Edit], index: int) -> Tensor:
        """Whether each image of an edit's share of the prompts shows its object."""
        prompts = self.prompts[index :: len(edits)]
        if not prompts:
            return torch.zeros(0, EDITED_SEEDS)
        images = self.bench.images(
            key, self.model, self.model.encode(prompts), made_from=list(prompts), edit=edits[index], seeds=EDITED_SEEDS
        )
        return objects.finds(self.network, images, prompted(prompts))


def trial_costs(bench: Bench, memories: int) -> dict[str, int]:
    """The cells that are sure to be drawn, with their U-Net rows; what comes on top depends on what they reach."""
    costs: dict[str, int] = {}
    for name, settings in (("nemo", NEMOS[:1]), ("wanda", WANDAS)):
        for index in range(len(settings)):
            costs |= bench.costs(f"{name}-{index} {JOINT} 0", memories)
            for memory in range(memories):
                costs |= bench.costs(f"{name}-{index} {OWN} {memory}", 1)
    return costs


def _made(trial: Trial, name: str, label: str, plan: Plan, texts: Mapping[str, str], ordinary: Sequence[str]) -> Edits:
    """The edits of a plan for these prompts, in a folder of their own."""
    bench, model = trial.bench, trial.model
    run = Run(bench.run.folder / name, say=bench.run.say, modules=bench.run.modules)
    run.plan(f"verify, edits of {label}", edit_cells(model, plan, list(texts), len(ordinary)))
    return make_edits(
        model, plan, run, base={"model": model_fingerprint(model)}, prompts=texts, ordinary=list(ordinary)
    )


def nemo_trials(trial: Trial, calibration: Sequence[str]) -> tuple[list[Tried], str]:
    """NeMo's settings in order until one works, and what its last search found, in words."""
    tried: list[Tried] = []
    said = ""
    for index, nemo in enumerate(NEMOS):
        label = nemo_name(nemo)
        # A folder for each setting: the cells of NeMo's edits bear the memories' names alone.
        plan = replace(trial.bench.plan, nemo=nemo, wandas=())
        own = list(_made(trial, f"nemo-{index}", label, plan, trial.texts, calibration).own[label].values())
        joint = union(label, own)
        details = [edit.details for edit in own]
        sizes = [sum(map(len, d["neurons"].values())) for d in details]
        neurons = sum(int(mask.any(dim=1).sum()) for mask in joint.masks.values())
        said = (
            f"{label}: {sum(d['flagged'] for d in details)} flagged, "
            f"{sum(d['suppressed'] for d in details)} suppressed, {np.median(sizes):g} neurons each (median), "
            f"{neurons} of {sum(len(mask) for mask in joint.masks.values())} in the union"
        )
        for way, chosen in ((JOINT, [joint]), (OWN, own)):
            tried.append(trial(f"nemo-{index} {way}", f"{label}, {way}", chosen))
            if tried[-1].reached:
                return tried, said
    return tried, said


def _wandas(trial: Trial, name: str, texts: Mapping[str, str]) -> list[Edit]:
    """The joint edit of these memories under every setting; its cells lie in a folder of their own."""
    edits = _made(trial, name, "Wanda's sweep", replace(trial.bench.plan, nemo=None, wandas=WANDAS), texts, ())
    return [edits.joint[wanda_name(wanda)] for wanda in WANDAS]


def wanda_trials(trial: Trial) -> list[Tried]:
    """The whole sweep of Wanda, jointly and for each memory alone."""
    ways = {
        JOINT: [_wandas(trial, "wanda-joint", trial.texts)],
        OWN: [_wandas(trial, cell_key("wanda", one), {one: text}) for one, text in trial.texts.items()],
    }
    return [
        trial(f"wanda-{index} {way}", f"{wanda_name(wanda)}, {way}", [edits[index] for edits in each])
        for way, each in ways.items()
        for index, wanda in enumerate(WANDAS)
    ]
