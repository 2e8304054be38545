"""How words of each memory sit in bus words: the rule of `arch.layout`, as constants."""

from dataclasses import dataclass

from ..arch.config import Config
from ..arch.isa import Memory
from ..arch.layout import word_bytes

__all__ = ["Geometry", "geometries"]


@dataclass(frozen=True)
class Geometry:
    """One memory's words on the bus; of `per_beat` and `beats_each` at least one is 1."""

    word_bits: int
    per_beat: int  # words in a bus word
    beats_each: int  # bus words of a word

    @property
    def spread(self) -> bool:
        """A word takes several bus words."""
        return self.beats_each > 1

    @property
    def parts(self) -> int:
        """Words of a bus word, or bus words of a word: whichever is more than one."""
        return max(self.per_beat, self.beats_each)


def geometries(config: Config, memories: list[Memory]) -> dict[Memory, Geometry]:
    """The geometry of each memory in `memories`."""
    return {memory: Geometry(word_bits=8 * (size := word_bytes(config, memory)),
                             per_beat=max(1, config.bus_bytes // size),
                             beats_each=-(-size // config.bus_bytes))
            for memory in memories}
