"""scikit-learn's 1,797 handwritten digits: a fixed split and the samples for the demo."""
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

HELD_OUT = 450
CALIBRATION = 256
SPLIT_SEED = 0


class Split(NamedTuple):
    """Images float32 [n, 1, 8, 8] in 0..1, labels int64 [n]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    images: np.ndarray
    labels: np.ndarray

    @property
    def calibration(self):
        """A fixed subset of the training images (the split has shuffled them already)."""
        return self.train_images[:CALIBRATION]


def load() -> Split:
    """1,347 training and 450 held-out images, the same ones every time, stratified by digit."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    train, held_out, train_labels, labels = train_test_split(
        images, digits.target.astype(np.int64), test_size=HELD_OUT, stratify=digits.target,
        random_state=SPLIT_SEED)
    return Split(train, train_labels, held_out, labels)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Rotate to 10 degrees, scale to 10 %, shift to 0.8 pixel, add noise; clipped to 0..1."""
    n = len(images)
    uniform = torch.rand(n, 4) * 2 - 1
    angle, scale = uniform[:, 0] * 0.175, 1 + uniform[:, 1] * 0.1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = uniform[:, 2:] * 0.2  # grid units: the image spans 2, so 0.2 is 0.8 pixel
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved + 0.03 * torch.randn_like(moved)).clamp(0, 1)


def save_samples(split: Split, path) -> None:
    """Calibration and held-out images for users without scikit-learn; replaces `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    np.savez_compressed(temporary, calibration=split.calibration, images=split.images,
                        labels=split.labels)
    os.replace(temporary, path)
