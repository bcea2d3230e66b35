"""Erasure: methods that take an image out of a model's weights, and the proof that it is out."""
