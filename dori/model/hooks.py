"""Forward hooks on named layers, gone when the block ends: watch what passes a layer, or replace what it puts out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

Act = Callable[[str, Tensor, Tensor], Tensor | None]


@contextmanager
def hooked(layers: Mapping[str, nn.Module], act: Act) -> Iterator[None]:
    """Inside the block, each forward pass of a layer calls `act(name, input, output)`.

    Args:
        layers: by name.
        act: what it returns takes the output's place; None leaves the output as it is.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> Tensor | None:
                return act(name, inputs[0], output)

            stack.enter_context(layer.register_forward_hook(hook))
        yield
