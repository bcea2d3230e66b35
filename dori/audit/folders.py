"""An audit's subjects from a user's model and folders of images."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer

from dori.audit.judge import Judge
from dori.audit.loop import Subjects, make_cases
from dori.errors import DoriError
from dori.image_file import size
from dori.memory import Memory, load_images, read_memories
from dori.metrics.alignment import OPENAI_MEAN, OPENAI_STD, Colour
from dori.metrics.copy_descriptor import load_copy_descriptor
from dori.metrics.sscd import load_sscd
from dori.model.load import LIBRARY_ERRORS, load_model
from dori.model.twins import load_twins
from dori.prompts import ordinary_prompts
from dori.testbed.subjects import DESCRIPTOR


def folder_subjects(
    model: str,
    *,
    memories: Path,
    controls: Path | None = None,
    ordinary: Path | None = None,
    twins: Sequence[str] = (),
    device: str = "cpu",
    half: bool = False,
) -> tuple[Subjects, Judge]:
    """Open everything that the command line names; all folders are read before the model is.

    Raises:
        DoriError: any of them cannot be read, the message then names file and line; or a twin cannot be compared.
    """
    groups = [_read(memories, "verbatim"), _read(controls, "control"), _read(ordinary, "ordinary")]
    seen: set[str] = set()
    for memory in (*groups[0], *groups[1]):
        if memory.id in seen:
            raise DoriError(f"id {memory.id!r} names a memory and a control; give ids that differ in metadata.jsonl")
        seen.add(memory.id)
    dtype = torch.float16 if half else torch.float32
    opened = load_model(_testbed_folder(model), device=device, dtype=dtype)
    others = load_twins(opened, twins, device=device, dtype=dtype)
    side = opened.image_side_px
    groups = [tuple(_in_square(memory, side) for memory in group) for group in groups]
    pictures = [load_images(group, side) if group else torch.zeros(0, 3, side, side) for group in groups]
    prompts = tuple(memory.text for memory in groups[2] if memory.text) or ordinary_prompts()
    subjects = Subjects(
        opened,
        make_cases(opened, groups[0], pictures[0], "memory"),
        make_cases(opened, groups[1], pictures[1], "control"),
        prompts,
        pictures[2] if len(pictures[2]) > 1 else None,
        others,
    )
    # Its threshold was measured on the testbed's images and says nothing about others: no calibration is claimed.
    descriptor = dataclasses.replace(
        load_copy_descriptor(DESCRIPTOR, device=device), calibration=None, masked_calibration=None
    )
    return subjects, Judge(descriptor)


@dataclass(frozen=True, slots=True)
class OwnJudge:
    """What a user gives instead of parts of the judge: a CLIP's folder, SSCD's weights, a threshold."""

    clip: Path | None = None
    sscd: Path | None = None
    sscd_preprocessing: str = "skew_320"
    threshold: float | None = None

    def instead_of(self, judge: Judge, *, device: str) -> Judge:
        """The judge with these parts.

        Raises:
            DoriError: one of them cannot be read.
        """
        if self.clip is not None:
            judge = load_clip(judge, self.clip, device=device)
        descriptor = judge.descriptor
        if self.sscd is not None:
            descriptor = load_sscd(self.sscd, preprocessing=self.sscd_preprocessing, device=device)
        if self.threshold is not None:
            descriptor = dataclasses.replace(descriptor, threshold=self.threshold, calibration=None)
        return dataclasses.replace(judge, descriptor=descriptor)


def load_clip(judge: Judge, folder: Path, *, device: str = "cpu") -> Judge:
    """The judge with a CLIP for alignment and image features.

    Args:
        judge: whose descriptor stays.
        folder: a CLIP as transformers saves it: config.json, safetensors, tokenizer; colours from
            preprocessor_config.json where there is one.
        device: where it runs.

    Raises:
        DoriError: no such folder, another model, or weights that are missing.
    """
    try:
        clip, report = CLIPModel.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError("weights are missing")
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        colours = folder / "preprocessor_config.json"
        stored = json.loads(colours.read_text(encoding="utf-8")) if colours.is_file() else {}
        mean, std = (
            _colour(stored.get(name, default))
            for name, default in (("image_mean", OPENAI_MEAN), ("image_std", OPENAI_STD))
        )
    except LIBRARY_ERRORS as error:
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:120]
        raise DoriError(
            f"{folder} cannot be opened as a CLIP ({reason}); give a folder that transformers' CLIPModel "
            "and its processor were saved to, with safetensors"
        ) from None
    clip.eval().requires_grad_(False).to(device)
    return dataclasses.replace(judge, clip=clip, tokenizer=tokenizer, mean=mean, std=std)


def _colour(values: Sequence[float]) -> Colour:
    red, green, blue = map(float, values)
    return red, green, blue


def _read(folder: Path | None, kind: str) -> tuple[Memory, ...]:
    return () if folder is None else read_memories(folder, default_kind=kind)


def _in_square(memory: Memory, side_px: int) -> Memory:
    """The memory with its box in pixels of the square that `load_image` makes of the file."""
    if memory.varying_box is None:
        return memory
    width, height = size(memory.image)
    side = min(width, height)
    offsets, scale = ((width - side) // 2, (height - side) // 2), side_px / side
    edges = [(edge - offsets[index % 2]) * scale for index, edge in enumerate(memory.varying_box)]
    left, top = (max(0, math.floor(edge)) for edge in edges[:2])
    right, bottom = (min(side_px, math.ceil(edge)) for edge in edges[2:])
    if left >= right or top >= bottom:  # what varies was cut away
        return dataclasses.replace(memory, varying_box=None)
    if (left, top, right, bottom) == (0, 0, side_px, side_px):
        raise DoriError(
            f"varying_box of {memory.id!r} covers the whole square of {memory.image} that the model sees; "
            "mark only the part that varies"
        )
    return dataclasses.replace(memory, varying_box=(left, top, right, bottom))


def _testbed_folder(model: str) -> str:
    if model != "testbed":
        return model
    from dori.testbed.folder import DATA

    return str(DATA / "model")
