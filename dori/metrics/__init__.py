"""Judges: copy descriptors, replication, diversity, quality and alignment. Pure functions of images and features."""
