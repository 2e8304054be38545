"""What the rules of streams and of the memory port are, as checkers of recorded cycles."""

__all__ = ["PAGE_BYTES", "BurstChecker", "ProtocolError", "StreamChecker"]

PAGE_BYTES = 4096  # no burst crosses a multiple of it


class ProtocolError(AssertionError):
    """A rule of a port was broken; the message names the port and the rule."""


class StreamChecker:
    """Valid and payload of a stream hold until ready."""

    def __init__(self, name: str):
        self.name = name
        self._held: int | None = None  # payload that was offered and not taken

    def step(self, valid: bool, ready: bool, payload: int) -> None:
        """One cycle as it is at the clock edge."""
        if self._held is not None:
            if not valid:
                raise ProtocolError(f"Valid of {self.name} must hold until ready")
            if payload != self._held:
                raise ProtocolError(f"Payload of {self.name} must hold until ready, but changed from "
                                    f"{self._held:#x} to {payload:#x}")
        self._held = payload if valid and not ready else None


class BurstChecker:
    """Bursts of one direction of a memory port, and the words that belong to them.

    Words of a write may come before their command.
    """

    def __init__(self, name: str, bus_bytes: int, size: int):
        self.name, self.bus_bytes, self.size = name, bus_bytes, size
        self.announced = self.moved = 0  # bus words

    def command(self, address: int, beats: int) -> None:
        last = address + beats * self.bus_bytes - 1
        if not beats:
            raise ProtocolError(f"Burst of {self.name} must have a word at least")
        if address % self.bus_bytes:
            raise ProtocolError(f"Burst of {self.name} must start at a multiple of {self.bus_bytes}, "
                                f"not at {address:#x}")
        if address // PAGE_BYTES != last // PAGE_BYTES:
            raise ProtocolError(f"Burst of {self.name} must not cross a {PAGE_BYTES}-byte boundary, "
                                f"as from {address:#x} to {last:#x}")
        if last >= self.size:
            raise ProtocolError(f"Burst of {self.name} must end within {self.size:#x} bytes, not at "
                                f"{last:#x}")
        self.announced += beats

    def word(self) -> None:
        self.moved += 1

    def finish(self) -> None:
        """At the end of a run: as many words as were announced."""
        if self.moved != self.announced:
            raise ProtocolError(f"Bursts of {self.name} must move the {self.announced} words that "
                                f"they announced, not {self.moved}")
