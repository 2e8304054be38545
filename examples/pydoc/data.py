"""Python's own documentation, `pydoc_data.topics`, as characters: a fixed split and samples."""
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

CONTEXT = 64  # characters that the model sees at once
HELD_OUT = 10  # every tenth topic
CALIBRATION, SAMPLES = 64, 128  # sequences
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # what else there is counts as "?"


class Split(NamedTuple):
    """Characters as int64, indices into `ALPHABET`."""

    train: np.ndarray
    held_out: np.ndarray


def encode(text: str) -> np.ndarray:
    """Indices into `ALPHABET`, int64 [len(text)]."""
    index = {character: number for number, character in enumerate(ALPHABET)}
    return np.array([index.get(character, index["?"]) for character in text], np.int64)


def load() -> Split:
    """The topics in the order of their names; depends on the version of Python."""
    texts = [topics[name] for name in sorted(topics)]
    held_out = texts[HELD_OUT // 2::HELD_OUT]
    rest = [text for number, text in enumerate(texts) if number % HELD_OUT != HELD_OUT // 2]
    return Split(encode("\n".join(rest)), encode("\n".join(held_out)))


def sequences(text: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int64 [count, CONTEXT + 1]: characters from random places, and the one behind them."""
    starts = np.random.default_rng(seed).integers(len(text) - CONTEXT, size=count)
    return text[starts[:, None] + np.arange(CONTEXT + 1)]


def save_samples(split: Split, path: Path) -> None:
    """Calibration and held-out sequences, for users of any version of Python; replaces `path`."""
    held_out = sequences(split.held_out, SAMPLES, seed=1)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    np.savez_compressed(temporary, calibration=sequences(split.train, CALIBRATION, seed=0)[:, :-1],
                        ids=held_out[:, :-1], next=held_out[:, 1:])
    os.replace(temporary, path)
