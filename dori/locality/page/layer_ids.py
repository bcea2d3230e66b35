"""One name for a layer on the whole page: the ID of its transformer block, as the paper counts them.

Blocks count from 1 in the order in which the network runs them: down, mid, up. Their own names stand in the key alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dori.locality.records import Locality

PARTS = {"attention_value": "values", "feed_forward": "feed-forward"}  # site -> what one layer of it is called
ENDINGS = (".attn2.to_v", ".ff.net.2")  # what the sites' names add to their block's


def blocks(found: Locality) -> dict[int, str]:
    """The names of the transformer blocks by ID."""
    names = max(found.settings["layers"].values(), key=len)  # a block without cross-attention has a feed-forward
    for ending in ENDINGS:
        names = [name.removesuffix(ending) for name in names]
    return dict(enumerate(names, 1))


def layer_id(found: Locality, layer: str) -> int | None:
    """The ID of the block that a layer or a parameter lies in; None outside all of them."""
    return next((number for number, block in blocks(found).items() if layer.startswith(f"{block}.")), None)


def numbered(found: Locality, layers: Iterable[str]) -> dict[int, str]:
    """Layers by the IDs of their blocks; those outside all blocks are left out."""
    return {number: layer for layer in layers if (number := layer_id(found, layer)) is not None}


def called(found: Locality, layer: str) -> str:
    """A layer in a sentence: "the feed-forward of layer 3"; the own name of what lies in no block."""
    number = layer_id(found, layer)
    site = next((part for site, part in PARTS.items() if layer in found.settings["layers"].get(site, ())), None)
    return layer if number is None or site is None else f"the {site} of layer {number}"


def module(found: Locality, layer: str) -> str:
    """A module of any kind beside others: "layer 3: ff.net.0.proj"; the own name of what lies in no block."""
    number = layer_id(found, layer)
    return layer if number is None else f"layer {number}: {layer.removeprefix(f'{blocks(found)[number]}.')}"


def key(found: Locality) -> str:
    """Which IDs are whose, in a sentence: by down, mid and up block, in which they follow its own order."""
    owners: dict[str, list[int]] = {}
    for number, block in blocks(found).items():
        owners.setdefault(block.split(".attentions")[0], []).append(number)
    told = ", ".join(f"{_range(numbers)} {owner}" for owner, numbers in owners.items())
    return (
        "Layers go by the ID of their transformer block, counted as the network runs them (all names: at the end, "
        f"under Settings): {told}."
    )


def _range(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first} {'and' if len(numbers) == 2 else 'to'} {last}"


def with_key(found: Locality) -> Mapping[str, Any]:
    """The settings, their lists of layers as one table by ID."""
    sites = {site: numbered(found, layers) for site, layers in found.settings["layers"].items()}
    table = [{"id": number, **{site: layers.get(number) for site, layers in sites.items()}} for number in blocks(found)]
    return {**found.settings, "layers": table}
