"""Attacks: searches for an input that brings a training image back."""
