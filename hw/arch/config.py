"""The size of an accelerator."""

import dataclasses
import hashlib
import json
from functools import cached_property

__all__ = ["Config", "ConfigError"]


class ConfigError(ValueError):
    """A `Config` field that breaks a rule; the message names the field, the rule and the value."""


def bound(low: int, high: int, doc: str, **default: int):
    return dataclasses.field(metadata={"low": low, "high": high, "doc": doc}, **default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that gateware is generated from. Immutable; two equal configurations have equal
    digests, and a program runs only where the digests agree.

    The linear unit makes ``tokens * outputs * depth`` products a cycle and the attention unit
    ``2 * queries * depth``. `depth` bytes are one word of the activation memory.

    Raises
    ------
    ConfigError
        A field out of its bounds, or a combination that no gateware exists for.
    """

    tokens: int = bound(1, 64, "token rows that the linear unit takes at once")
    outputs: int = bound(1, 128, "output channels that the linear unit takes at once")
    depth: int = bound(1, 64, "products summed per lane and cycle; bytes of an activation word")
    queries: int = bound(1, 64, "query rows that the attention unit holds")
    lanes: int = bound(1, 64, "results per cycle of write-back; 16-bit values of a residual word")
    bus_bytes: int = bound(2, 128, "bytes of a memory bus word")
    activation_banks: int = bound(1, 8, "independent banks of the activation memory")
    activation_words: int = bound(4, 1 << 16, "words of one activation bank")
    residual_words: int = bound(4, 1 << 18, "words of the residual memory")
    weight_words: int = bound(4, 1 << 16, "words of the weight memory, outputs x depth bytes each")
    param_words: int = bound(4, 1 << 14, "words of the parameter memory, lanes channels each")
    narrow: int = bound(0, 1, "1: weights of 4 bits, too, two of them to a multiplier",
                        default=0)
    products: int = bound(0, 1, "1: products of two results, too, as in a gated linear unit",
                          default=0)
    rotary: int = bound(0, 1, "1: NORM turns pairs of values, as rotary embeddings do", default=0)
    tables: int = bound(1, 16, "pointwise tables of 256 entries")
    row_words: int = bound(2, 1 << 12, "activation words of the longest row that a matrix product or a "
                                      "normalisation takes")
    max_rows: int = bound(2, 4096, "token rows: queue entries per expert, keys per query")
    max_experts: int = bound(1, 256, "experts of one router")
    max_chosen: int = bound(1, 16, "experts per token")
    router_forms: int = bound(0, 1, "1: routers with sigmoid scores, corrections, groups of "
                                    "experts, a sparse mixer or a capacity, too", default=0)
    queue: int = bound(1, 64, "instructions that wait at each engine")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"Config.{field.name} must be an integer between {low} and {high}, "
                                  f"not {value!r}")
        if self.bus_bytes & (self.bus_bytes - 1):
            raise ConfigError(f"Config.bus_bytes must be a power of two, not {self.bus_bytes}")
        for name in ("outputs", "depth"):
            if getattr(self, name) % self.lanes:
                raise ConfigError(f"Config.lanes must divide Config.{name} = {getattr(self, name)}, "
                                  f"not be {self.lanes}")
        if self.rotary and self.lanes % 2:
            raise ConfigError(f"Config.lanes must be even where Config.rotary is 1, as a pair lies in "
                              f"one word, not {self.lanes}")
        if self.max_chosen > self.max_experts:
            raise ConfigError(f"Config.max_chosen must be at most Config.max_experts = "
                              f"{self.max_experts}, not {self.max_chosen}")
        if self.activation_banks * self.activation_words > 1 << 20:
            raise ConfigError("Config.activation_banks * Config.activation_words must be at most "
                              f"{1 << 20}, not {self.activation_banks * self.activation_words}")

    @property
    def linear_macs(self) -> int:
        """Products per cycle of the linear unit."""
        return self.tokens * self.outputs * self.depth

    @property
    def attention_macs(self) -> int:
        """Products per cycle of the attention unit, both stages."""
        return 2 * self.queries * self.depth

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, int]) -> "Config":
        """The inverse of `to_dict`; options that are left out are off."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        needed = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        if not needed <= set(fields) <= set(known):
            raise ConfigError(f"Config must have exactly the fields {sorted(needed)}, and of "
                              f"{sorted(set(known) - needed)} what is not off, not {sorted(fields)}")
        return cls(**fields)

    @cached_property
    def digest(self) -> int:
        """32 bits that name this configuration, in a register of the gateware and in programs."""
        text = json.dumps([ARCHITECTURE_VERSION, self.to_dict()], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


# Part of the digest: raise it whenever the meaning of an instruction, a layout or an operation of
# `numerics` changes, so that an old program never runs on new gateware.
ARCHITECTURE_VERSION = 5
