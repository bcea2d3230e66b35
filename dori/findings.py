"""What an audit finds, as plain records, and their JSON form (`audit.json`, schema in docs/audit-json.md).

A finding is one image under one model, one edit and one way of asking; tables and figures are made from findings
alone (`dori.report`), so that a report can be drawn again at any time without a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dori.record_file import read_record, record_json

SCHEMA = 1
Group = Literal["memory", "control"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One image, judged.

    Args:
        id: the image's id.
        group: memory or control.
        kind: verbatim, template, once, control, ...
        dose: relative duplication count, where known.
        model: the audited model's name, or a twin's.
        edit: name of the edit that was on ("none" without).
        edit_scope: "joint" (one edit for all memories), "own" (the edit of this memory), or "" without an edit.
        start: where the attack began: prompt, gaussian, foreign; "" when the prompt itself was used.
        steps: attack steps behind the embedding; 0 for the prompt itself or an unattacked start.
        similarities: cosine to the training image, one per fresh seed, in [-1, 1].
        masked: the same blind to the part that varies, of templates and of controls that carry a box; else empty.
        to_unedited: cosine to the unedited model's image of the same seed and embedding source; empty if none.
        diversity: median pairwise cosine among this finding's images (D_SSCD); None with one seed.
        alignment: cosine of image and prompt, one per seed; empty without a text or an alignment model.
        picture: file of the first seed's image, relative to the run's folder.
    """

    id: str
    group: Group
    kind: str
    dose: float | None
    model: str
    edit: str
    edit_scope: str
    start: str
    steps: int
    similarities: tuple[float, ...]
    masked: tuple[float, ...] = ()
    to_unedited: tuple[float, ...] = ()
    diversity: float | None = None
    alignment: tuple[float, ...] = ()
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """One audited image as the report shows it: `picture` is the training image, relative to the run's folder.

    `sha256` is over its pixels as the model sees them, "" where it is not known.
    """

    id: str
    group: Group
    kind: str
    dose: float | None
    text: str | None
    picture: str
    first_gradient: float | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class EditInfo:
    """An edit in the audit: `size` changed weights; `details` of the method (thresholds, densities, scores).

    Of scope "own" one record stands for the edits of all memories: `size` is their median (the lower one of an even
    count), `details["sizes"]` each memory's.
    """

    name: str
    scope: str
    size: int
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Quality:
    """What an edit does to ordinary prompts: distances to held-out ordinary images, alignment, and drift.

    `frechet` and `kernel` are between `features` (which network, which preprocessing) of generated images and of
    `references` images that `reference` names; `to_unedited` is the median cosine between images of the edited and
    the unedited model with the same seeds, with its 95 % bootstrap interval over prompts. Empty, 0 and null where an
    audit does not say.
    """

    model: str
    edit: str
    prompts: int
    frechet: float
    kernel: float
    kernel_std: float
    alignment: float | None
    to_unedited: float | None
    features: str = ""
    reference: str = ""
    references: int = 0
    to_unedited_low: float | None = None
    to_unedited_high: float | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """A whole audit.

    Args:
        model: name of the audited model.
        twins: names of models that never saw the memories; judges only.
        descriptor: name, preprocessing, threshold and calibration of the similarity.
        settings: preset, seeds, sampling and attack settings, fingerprints.
        provenance: versions and platform; `provenance["times"]` alone differs between equal runs.
        cost: U-Net rows by stage.
        blind: AUROC, memories against controls, of scores that look at no model (file size, VAE error, caption).
        distrust: reasons to distrust this audit, one sentence each.
    """

    model: str
    twins: tuple[str, ...]
    descriptor: Mapping[str, Any]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    cost: Mapping[str, int]
    subjects: tuple[Subject, ...]
    edits: tuple[EditInfo, ...]
    findings: tuple[Finding, ...]
    quality: tuple[Quality, ...]
    blind: Mapping[str, float]
    distrust: tuple[str, ...]
    schema: int = field(default=SCHEMA)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no NaN."""
        return record_json(self)


def read_audit(path: Path) -> Audit:
    """Read `audit.json`.

    Raises:
        DoriError: no such file, no audit, or another schema version.
    """
    return read_record(path, Audit, schema=SCHEMA, what="audit")
