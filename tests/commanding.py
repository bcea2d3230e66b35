"""A command given to `dori` in this process, and folders as a user has them, for the tests of commands."""

from collections.abc import Sequence
from pathlib import Path

import conftest
import pytest
import torch

from dori.cli import main
from dori.erase.write import save_model
from dori.memory import Memory, write_memories
from dori.model.stable_diffusion import StableDiffusion

FEW_STEPS = ("--sampling-steps", "2", "--guidance-scale", "3")


def status(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, results and messages of a command."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return int(stopped.value.code or 0), said.out, said.err


def saved_with_twin(folder: Path) -> StableDiffusion:
    """A tiny model that reads whole sentences, written to `model`, and changed, as it is returned, to `twin`."""
    (folder / "words").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "CONTEXT", 64)
        model = StableDiffusion(**conftest.tiny_parts(folder / "words"), name="tiny")
    save_model(model, folder / "model", source="tiny")
    save_changed(model, model.unet.conv_in.weight, folder / "twin")
    return model


def write_folder(folder: Path, texts: Sequence[str | None], *, seed: int) -> None:
    """Random images with these texts."""
    generator = torch.Generator().manual_seed(seed)
    memories = [Memory(f"{folder.name}-{i}", text, Path("x")) for i, text in enumerate(texts)]
    write_memories(folder, [(memory, torch.rand(3, 16, 16, generator=generator)) for memory in memories])


def save_changed(model: StableDiffusion, weight: torch.Tensor, folder: Path) -> None:
    """Change a weight of the model by a tenth, and write the model to `folder`."""
    with torch.no_grad():
        weight.mul_(1.1)
    save_model(model, folder, source="tiny")
