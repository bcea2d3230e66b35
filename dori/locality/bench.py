"""What every stage of a locality run needs: the model, who judges, the plan, the cells, and the judging itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dori.audit.judge import Case, Judge, draw, finite_images, likeness, pixels_sha256
from dori.locality.costs import Rows
from dori.locality.plan import Plan
from dori.metrics.similarity import cosine
from dori.model.stable_diffusion import StableDiffusion
from dori.run import Run, canonical_sha256


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Embeddings with what they were made from.

    Cells depend on the origin, never on rounded numbers, so that another number of threads gives the same cells.

    Args:
        y: shape (n, l, d).
        origin: texts, seeds, settings, or the hash of another origin: JSON-able.
    """

    y: Tensor
    origin: Mapping[str, object]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def sha256(self) -> str:
        """Hash of the origin."""
        return canonical_sha256(self.origin)

    def take(self, rows: Sequence[int]) -> "Source":
        """Some of the embeddings."""
        return Source(self.y[list(rows)], {"of": self.sha256, "rows": list(rows)})


def encoded(model: StableDiffusion, texts: Sequence[str]) -> Source:
    """Prompt embeddings."""
    return Source(model.encode(texts).cpu(), {"texts": list(texts)})


@dataclass(slots=True, eq=False)
class Bench:
    """The fixed parts of one run, and what its cells cost, whenever they were computed.

    Args:
        model: the analysed model.
        judge: whose descriptor decides about replication.
        plan: the settings.
        run: the folder that remembers.
        fingerprint: of the model, an input of every cell.
        judged_by: what the judge is, in cells' inputs.
        cost: U-Net rows by stage.
        counted: cells that several memories share, once their cost is counted.
    """

    model: StableDiffusion
    judge: Judge
    plan: Plan
    run: Run
    fingerprint: str
    judged_by: Mapping[str, object]
    cost: dict[str, int] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)

    def tensors(
        self, key: str, inputs: Mapping[str, object], rows: Rows, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """As `Run.once_tensors`, with the model among the inputs; counted by planned rows, for NeMo an upper bound."""
        found = self.run.once_tensors(key, {"model": self.fingerprint} | dict(inputs), compute)
        self.count(key.split(".")[0], rows)
        return found

    def count(self, stage: str, rows: Rows) -> None:
        """Add to the cost of a stage."""
        for kind, count in (("forward and backward", rows.attacked), ("forward", rows.forward)):
            if count:
                self.cost[f"{stage}, {kind}"] = self.cost.get(f"{stage}, {kind}", 0) + count

    def count_shared(self, key: str, rows: Rows) -> None:
        """Add the cost of a cell that several memories ask for, the first time alone."""
        if key not in self.counted:
            self.counted.add(key)
            self.count(key.split(".")[0], rows)

    def skip(self, keys: Iterable[str]) -> None:
        """Planned cells that turned out not to be needed count as done."""
        if self.run.progress is not None:
            for key in keys:
                self.run.progress.done(key, stored=True)

    def judged_inputs(self, case: Case, source: Source, seeds: Sequence[int]) -> dict[str, object]:
        """All that `similarities` depends on beside the model."""
        return {
            "source": source.sha256,
            "seeds": list(seeds),
            "image": pixels_sha256(case.image),
            "steps": self.plan.sampling_steps,
            "guidance_scale": self.plan.guidance_scale,
            "judge": self.judged_by["descriptor"],
        }

    def similarities(self, case: Case, embeddings: Tensor, seeds: Sequence[int]) -> Tensor:
        """Similarity to the memory of a generation of every embedding (n, l, d) under every seed, shape (n, s)."""
        parts = [
            self.similar(case, draw(self.model, self.plan.judging(), part, seeds)) for part in embeddings.split(64)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, len(seeds))

    def similar(self, case: Case, images: Tensor) -> Tensor:
        """Similarity to the memory of images (n, s, 3, H, W), shape (n, s); one that diverged is like nothing."""
        return likeness(self.judge.descriptor, case.image, images)

    def alike(self, images: Tensor, others: Tensor) -> Tensor:
        """Similarity of images (s, 3, H, W) to others, one by one, shape (s,); what diverged is like nothing."""
        (mine, finite), (theirs, sound) = finite_images(images), finite_images(others)
        descriptor = self.judge.descriptor
        return cosine(descriptor(mine).cpu() * finite[:, None], descriptor(theirs).cpu() * sound[:, None])

    def replicates(self, similarities: Tensor) -> Tensor:
        """Which embeddings replicate, booleans (n,)."""
        return copies(similarities, self.judge.descriptor.threshold)


def copies(similarities: Tensor, threshold: float) -> Tensor:
    """Which of n embeddings replicate, booleans (n,): the median over s seeds, of (n, s), is above the threshold."""
    return similarities.double().quantile(0.5, dim=1) > threshold
