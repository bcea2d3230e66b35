"""The small convolutional trunk of Dori's own judges of 64 x 64 images: copy descriptor and object classifier."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

GROUPS = 8
Network = TypeVar("Network", bound=nn.Module)


class Convolution(nn.Module):
    """3 x 3 convolution, group norm (one image never depends on its batch), ReLU; added to the input where it fits."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.residual = channels_in == channels_out and stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(GROUPS, channels_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, H, W) to (n, channels_out, H / stride, W / stride)."""
        y = self.layers(x)
        return x + y if self.residual else y


def trunk(layers: Sequence[tuple[int, int]]) -> nn.Sequential:
    """Convolutions on RGB, given as pairs of output channels and stride."""
    channels = [3, *(out for out, _ in layers)]
    return nn.Sequential(
        *(Convolution(into, out, stride) for into, (out, stride) in zip(channels, layers, strict=False))
    )


def initialised(make: Callable[[], Network], seed: int) -> Network:
    """The network under He's initialisation; depends on the seed alone and leaves the global generator as it was."""
    with torch.device("meta"):
        network = make()
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * math.sqrt(2 / fan_in))
            else:  # scales of the norms, and biases
                parameter.fill_(1.0 if name.startswith("trunk") and name.endswith("weight") else 0.0)
    return network
