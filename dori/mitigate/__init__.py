"""Mitigations: methods that leave an edit which should stop a memorized image from coming back."""
