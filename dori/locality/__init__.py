"""Locality: where a memory lies in embedding space, in activations and in weights, and whether that is chance."""
