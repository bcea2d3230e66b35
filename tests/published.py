"""How the original code of Stable Diffusion names the weights of the tiny U-Net, written down by its own layout."""

from collections.abc import Iterable, Mapping

RESNET = {
    ".norm1": ".in_layers.0",
    ".conv1": ".in_layers.2",
    ".time_emb_proj": ".emb_layers.1",
    ".norm2": ".out_layers.0",
    ".conv2": ".out_layers.3",
    ".conv_shortcut": ".skip_connection",
}


def unet_places(layers: int) -> dict[str, str]:
    """Where the parts of the tiny U-Net, with so many layers a block, stand in the original's numbering."""
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "down_blocks.0.downsamplers.0.conv": f"input_blocks.{layers + 1}.0.op",
        "up_blocks.0.upsamplers.0.conv": f"output_blocks.{layers}.1.conv",
    }
    for block in range(2):
        for layer in range(layers):
            place = f"input_blocks.{1 + block * (layers + 1) + layer}"
            places[f"down_blocks.{block}.resnets.{layer}"] = f"{place}.0"
            places[f"down_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        for layer in range(layers + 1):
            place = f"output_blocks.{block * (layers + 1) + layer}"
            places[f"up_blocks.{block}.resnets.{layer}"] = f"{place}.0"
            places[f"up_blocks.{block}.attentions.{layer}"] = f"{place}.1"
    return places


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A name in which every part is called as the original calls it."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def unet_names(names: Iterable[str], *, layers: int = 1) -> dict[str, str]:
    """The original's name in a single file to that of the tiny U-Net with so many layers a block, for every weight."""
    places, found = unet_places(layers), {}
    for name in names:
        prefix = max((ours for ours in places if name.startswith(f"{ours}.")), key=len)
        rest = name.removeprefix(prefix)
        if "resnets" in prefix:
            rest = renamed(rest, {f"{ours}.": f"{theirs}." for ours, theirs in RESNET.items()})
        found[f"model.diffusion_model.{places[prefix]}{rest}"] = name
    return found
