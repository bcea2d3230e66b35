"""Erasure: methods that take an image out of a model's weights, and the proof that it is out."""

# Literal, and free of imports, so that the command line can list them at once; `dori.erase.erasers` makes them.
TABLES = ("erasers", "ablations", "frontier")
ERASERS = (
    "adversarial",
    "adversarial-relapses",
    "adversarial-paper",
    "ordinary",
    "naive-deletion",
    "gradient-ascent",
    "erase-diff",
    "siss",
    "siss-as-released",
    "esd",
    "concept-ablation",
    "uce",
)
DEFAULT = "adversarial"
ARMS = (
    "whole recipe",
    "paper's loss",
    "both losses",
    "neighbours held",
    "prompt only",
    "first round's triggers",
    "prompt starts",
    "gaussian starts",
    "no retain loss",
    "LoRA",
    "LoRA, rate x 10",
    "attention only",
    "one round",
    "three rounds",
)
