"""Progress bars on stderr, for what takes longer than a moment."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["frames_bar", "stages_bar"]


@contextmanager
def frames_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A `moeware.runtime.device.Progress` that draws a bar."""
    with tqdm(desc=label, unit="frame", leave=False, disable=None) as bar:
        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
        yield update


@contextmanager
def stages_bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress function of (stage that starts, its number from 1, stages in all)."""
    with tqdm(desc=label, unit="stage", leave=False, disable=None) as bar:
        def update(stage: str, number: int, total: int) -> None:
            bar.total = total
            bar.set_description(f"{label}: {stage}")
            bar.update(number - 1 - bar.n)
        yield update
