"""A model that cannot be compared is no twin; `dori audit` attacks the twins that a user gives."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commanding import FEW_STEPS, saved_with_twin, status, write_folder
from conftest import tiny_parts
from diffusers import DDIMScheduler, UNet2DConditionModel
from test_audit import BRIEF

from dori.audit.plan import PRESETS
from dori.errors import DoriError
from dori.findings import read_audit
from dori.model.stable_diffusion import StableDiffusion
from dori.model.twins import load_base, refuse_strangers
from dori.report.tables import called_twin

Parts = dict[str, object]


def another_unet(parts: Parts, **changes: object) -> None:
    """A U-Net of another configuration."""
    unet = parts["unet"]
    assert isinstance(unet, UNet2DConditionModel)
    parts["unet"] = UNet2DConditionModel.from_config(unet.config, **changes)


def another_scheduler(parts: Parts, **changes: object) -> None:
    """A scheduler of another configuration."""
    scheduler = parts["scheduler"]
    assert isinstance(scheduler, DDIMScheduler)
    parts["scheduler"] = DDIMScheduler.from_config(scheduler.config, **changes)


STRANGERS: dict[str, tuple[Callable[[Parts], object], str]] = {
    "another latent": (lambda parts: another_unet(parts, sample_size=16), "latents or embeddings of another shape"),
    "another U-Net": (lambda parts: another_unet(parts, layers_per_block=2), "a U-Net of another shape"),
    "another VAE": (lambda parts: parts["vae"].decoder.conv_in.bias.data.add_(1), "another VAE"),  # type: ignore[attr-defined]
    "another scale": (lambda parts: parts["vae"].register_to_config(scaling_factor=0.5), "another VAE"),  # type: ignore[attr-defined]
    "another schedule": (lambda parts: another_scheduler(parts, beta_end=0.02), "another noise schedule"),
    "velocity": (lambda parts: another_scheduler(parts, prediction_type="v_prediction"), "kind of prediction"),
    "itself": (lambda parts: None, "the weights of tiny itself"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_model_that_cannot_be_compared_is_refused(name: str, tiny: StableDiffusion, tmp_path: Path) -> None:
    change, words = STRANGERS[name]
    parts = tiny_parts(tmp_path)
    change(parts)
    with pytest.raises(DoriError) as caught:
        refuse_strangers(tiny, [StableDiffusion(**parts, name="stranger")])
    sentence = str(caught.value)
    assert sentence.startswith("stranger has ") and words in sentence and "give --twin a model" in sentence


def test_one_twin_given_twice_is_no_second_twin(tiny: StableDiffusion, tmp_path: Path) -> None:
    """Twin minus twin would be zero, and everything planted minus twin an excess."""
    first, second = (StableDiffusion(**tiny_parts(tmp_path), name=name) for name in ("first", "second"))
    with torch.no_grad():
        for twin in (first, second):
            twin.unet.conv_in.weight.mul_(1.1)
    refuse_strangers(tiny, [first])
    with pytest.raises(DoriError, match="second has the weights of first"):
        refuse_strangers(tiny, [first, second])


def test_the_base_is_another_model_of_the_same_shape(
    tiny: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StableDiffusion(**tiny_parts(tmp_path), name="given")
    monkeypatch.setattr("dori.model.twins.load_model", lambda spec, device: model)
    with pytest.raises(DoriError, match=r"base \(given\) has the weights of tiny itself; give --base the model from"):
        load_base(tiny, "given")
    model.name = "given"
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(1.1)
    assert load_base(tiny, "given") is model and model.name == "base (given)"


def test_an_audit_attacks_the_twins_that_a_user_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "quick", lambda: dataclasses.replace(BRIEF, seeds=1))
    saved_with_twin(tmp_path)
    write_folder(tmp_path / "memories", ["a dog", None], seed=0)
    capsys.readouterr()  # what the libraries say when they save
    command = ["audit", str(tmp_path / "model"), "--memories", str(tmp_path / "memories"), *FEW_STEPS]
    code, _, said = status([*command, "--twin", str(tmp_path / "model"), "--out", str(tmp_path / "no")], capsys)
    assert code == 2 and "has the weights of" in said and len(said.strip().splitlines()) == 1
    code, _, said = status([*command, "--twin", str(tmp_path / "twin"), "--out", str(tmp_path / "run")], capsys)
    assert code == 0, said
    found, twin = read_audit(tmp_path / "run" / "audit.json"), f"twin 1 ({tmp_path / 'twin'})"
    assert found.twins == (twin,)
    attacked = [(f.id, f.start) for f in found.findings if f.model == twin and f.start]
    # One of them has no text, so that all are asked from other prompts too.
    assert attacked == [(one, start) for start in ("gaussian", "foreign") for one in ("memories-0", "memories-1")]
    assert any("There are no controls: twins alone tell" in reason for reason in found.distrust)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "on twin 1 (" in page and "twin twin" not in page.lower()


def test_a_twin_is_called_one_once() -> None:
    assert [called_twin(name) for name in ("base", "twin 1 (x)", "twin-1")] == [
        "twin base",
        "twin 1 (x)",
        "twin twin-1",
    ]


def test_the_testbed_is_audited_beside_its_own_twins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = status(["audit", "testbed", "--twin", "x", "--out", str(tmp_path / "run")], capsys)
    assert code == 2 and "leave out --controls, --ordinary, --twin" in said and len(said.strip().splitlines()) == 1
