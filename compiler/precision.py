"""How many bits hold the weights of each layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

from moeware.compiler.errors import CompileError

__all__ = ["WEIGHT_BITS", "Precision"]

# Of a weight, and the largest integer there is: -n ... n. With `Config.narrow`, ternary weights are
# held like those of 4 bits.
WEIGHT_BITS = {8: 127, 4: 7, 2: 1}
KINDS = ("linear", "experts")


@dataclass
class Precision:
    """Bits of weights, 8 where nothing is said.

    bits : by a layer's name, a layer's name with one expert (``Experts_1/expert3``), or a kind of
    layers, "linear" or "experts"; the most special name counts. Names are those that reports use.
    average : of experts that nothing is said about, which `mixed_precision` gives theirs. nested : all
    experts have 8 bits, whose upper halves are weights, too.

    Raises
    ------
    CompileError
        A number of bits that weights cannot have; from `check`, a name that no layer has.
    """

    bits: Mapping[str, int] = field(default_factory=dict)
    average: float | None = None
    nested: bool = False
    used: set[str] = field(default_factory=set)

    def __post_init__(self):
        for name, bits in self.bits.items():
            if bits not in WEIGHT_BITS:
                raise CompileError(f"Weights of {name!r} must have {', '.join(map(str, WEIGHT_BITS))} "
                                   f"bits, not {bits!r}")
        if self.average is not None and not isinstance(self.average, Real):
            raise CompileError(f"Average bits of experts must be a number, not {self.average!r}")
        if self.average is not None and self.nested:
            raise CompileError(f"Bits of experts must be {self.average:g} on average or nested, not "
                               "both: leave one of them out")
        if self.average is not None and "experts" in self.bits:
            raise CompileError(f"Bits of 'experts' must be given as {self.bits['experts']} of each or "
                               f"as {self.average:g} on average, not both: name single experts or "
                               "layers beside an average")

    def of_expert(self, layer: str, expert: int) -> int | None:
        """Bits of an expert that something is said about."""
        bits = self.said(f"{layer}/expert{expert}", layer, "experts")
        if self.nested and bits is not None:
            raise CompileError(f"Bits of {layer} must not be given beside nested weights, which have 8 "
                               "and 4: leave one of them out")
        return bits

    def of_soft_expert(self, layer: str, expert: int) -> int:
        """Bits of an expert that all tokens share; it takes no part in an average, nor is it nested."""
        bits = self.of_expert(layer, expert)
        if self.nested:
            raise CompileError(f"Soft experts ({layer}) must not be nested, only experts that a router "
                               "chooses: leave nested weights out")
        if bits is None and self.average is not None:
            raise CompileError(f"Soft experts ({layer}) must have bits of their own beside an average, "
                               "which is for experts that a router chooses: give them some by name "
                               f"(--bits {layer}=8)")
        return bits or 8

    def said(self, *names: str) -> int | None:
        """Bits by the first of `names`, special ones first, that something is said about."""
        for name in names:
            if name in self.bits:
                self.used.add(name)
                return self.bits[name]
        return None

    def of(self, *names: str) -> int:
        """The same, 8 where nothing is said."""
        return self.said(*names) or 8

    def check(self) -> None:
        unknown = sorted(set(self.bits) - self.used - set(KINDS))
        if unknown:
            raise CompileError(f"Precision must name layers of the model or {' or '.join(KINDS)}, not "
                               f"{', '.join(map(repr, unknown))}: `moeware check` lists the layers")
