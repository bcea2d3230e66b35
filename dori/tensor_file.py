"""Safetensors files of Dori's own, read in one way: the header's texts and all tensors, or one sentence."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dori.errors import DoriError


def read_tensors(path: Path, *, what: str, mend: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file.

    Args:
        path: the file.
        what: what it should be, in words, for the error.
        mend: what to do where it cannot be read.

    Raises:
        DoriError: no such file, or a torn or foreign one.
    """
    try:
        with safe_open(path, "pt") as file:
            # Cloned: the reader maps the file, and a caller may keep tensors after it is replaced.
            return file.metadata() or {}, {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DoriError(f"{path} cannot be read as {what} ({error}); {mend}") from None
