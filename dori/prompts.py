"""Ordinary prompts for models that come without any.

Statistics, foreign starts and quality need captions that no memory has. They are composed from plain words, so that
nobody's captions are shipped.
"""

import itertools
import random

_SUBJECTS = (
    "dog cat horse bird bicycle boat bridge lighthouse kitchen garden street market forest mountain lake "
    "river castle library violin teapot chair lamp train tractor balloon orange pumpkin sunflower cactus "
    "owl fox rabbit turtle lion elephant windmill tent cottage staircase window"
).split()
_MANNERS = (
    "a photo of a {}",
    "a painting of a {}",
    "a drawing of a {} on paper",
    "a close-up of a {}",
    "a {} seen from far away",
    "an old postcard with a {}",
    "a poster of a {}",
    "a {} in black and white",
)
_PLACES = (
    "",
    " in the rain",
    " at night",
    " in winter",
    " by the sea",
    " in the morning light",
    " in a field",
    " under a blue sky",
)


def ordinary_prompts() -> tuple[str, ...]:
    """2,560 different captions in a fixed, mixed order."""
    combined = [
        manner.format(subject) + place for manner, subject, place in itertools.product(_MANNERS, _SUBJECTS, _PLACES)
    ]
    random.Random(0).shuffle(combined)
    return tuple(combined)
