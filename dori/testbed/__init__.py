"""The testbed: a small Stable-Diffusion-shaped model whose memorized images are known."""
