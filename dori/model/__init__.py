"""Adapters between Dori and other people's models."""
