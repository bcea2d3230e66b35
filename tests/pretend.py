"""A pretend accelerator: values lie on the CPU, but mixing them with tensors that say they are there is an error.

No machine that builds this project has a GPU. What goes wrong first on one is a tensor left on the CPU; here it goes
wrong too: every operation on a tensor of the device "pretend" is refused if another tensor with dimensions lies
elsewhere, as CUDA refuses it, and else computed on the CPU, so that results must agree.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Away(Tensor):
    """A tensor of the pretended device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type["Away"], inner: Tensor, requires_grad: bool = False) -> "Away":
        """Say of `inner` that it lies there."""
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        made.inner = inner
        return made

    @property
    def data(self) -> "Away":  # type: ignore[override]
        """The same values without gradient; to set it exchanges what the tensor holds, `inner` with it."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, other: "Away") -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner = other.inner

    def tolist(self) -> Any:
        """Numbers; a real device copies them by itself."""
        return self.cpu().tolist()

    def new_tensor(self, numbers: Any) -> "Away":  # type: ignore[override]
        """Numbers, there; torch makes them without an operation."""
        return Away(self.inner.new_tensor(numbers))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _refuse_mixed(func: Any, args: Sequence[Any], leaves: Sequence[object]) -> None:
    away = [leaf for leaf in leaves if isinstance(leaf, Away)]
    here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Away) and leaf.dim()]
    if func in INDEXING:  # a tensor there takes indices from here, not the other way round
        values = args[2:3]
        mixed = not isinstance(args[0], Away) or any(v is leaf for v in values for leaf in here)
    else:
        mixed = func not in MOVES and bool(here)
    if away and mixed:
        shapes = [tuple(leaf.shape) for leaf in here]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} found {shapes} on the CPU")


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    _refuse_mixed(func, args, leaves)
    device = kwargs.get("device")
    there = any(isinstance(leaf, Away) for leaf in leaves) if device is None else torch.device(device).type == NAME
    if there and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu' ({func})")
    inner_args, inner_kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Away) else leaf, (args, kwargs))
    if there and device is not None:
        inner_kwargs["device"] = "cpu"
    result = func(*inner_args, **inner_kwargs)
    if func is aten._local_scalar_dense.default:
        return result
    if func._schema.name.endswith("_") and func._schema.is_mutable:
        return args[0] if result is not None else None
    return tree_map(lambda leaf: Away(leaf) if isinstance(leaf, Tensor) else leaf, result) if there else result


class _Operations(TorchDispatchMode):
    """Operations without a tensor of the device among their inputs: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _from_numbers(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and its like, which make a tensor without an operation."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **kwargs)
        return make(*args, device="cpu", **kwargs).to(device)

    return made


@contextmanager
def pretended() -> Iterator[str]:
    """Make the device available in this thread, in a process that has not yet run backwards; gives its name."""
    _setup_privateuseone_for_python_backend(NAME)
    with pytest.MonkeyPatch.context() as patch, _Operations():
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _from_numbers(getattr(torch, name)))
        yield NAME
