"""The testbed's CLIP tokenizer: a byte-level BPE learnt from the captions' own words."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from dori.testbed.scenes import ARTISTS, FRAMES, TITLES, kinds

CONTEXT_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def _words() -> list[str]:
    words = {word for kind in kinds() for word in kind.split()} | set(ARTISTS) | set(TITLES)
    words |= {"a", "an", "the", "of", "picture", "with", "and", "by", "no", "on"}
    return sorted(words) + [str(n) for n in range(1, FRAMES + 1)] + [","]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocabulary and merges into `folder` in CLIP's format (once) and open them.

    Every word of the captions becomes one token; any other text falls back to bytes, so no input is refused.
    """
    if not (folder / "vocab.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(
            vocab_size=4000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(_words() * 2, trainer)
        model = json.loads(bpe.to_str())["model"]
        vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
        vocabulary += [token for token in model["vocab"] if token not in set(vocabulary)] + [START, END]
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}), encoding="utf-8")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=CONTEXT_LENGTH
    )
