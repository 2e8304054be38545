"""Several masters share one memory port."""

from amaranth import Array, Cat, Module, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from .ports import Burst, MemoryPort
from .slices import RegisterSlice

__all__ = ["BurstOrder", "MemoryArbiter", "RoundRobin"]

BURSTS_IN_FLIGHT = 8  # of each direction


class RoundRobin(wiring.Component):
    """Lets one burst at a time through, beginning the search after the client that was last.

    One burst per cycle, without latency; a refused burst stays the chosen one.

    Members
    -------
    clients : In(stream.Signature(Burst)).array(count)
    chosen : Out(range(count))
    burst : Out(stream.Signature(Burst))
    """

    def __init__(self, count: int):
        self._count = count
        super().__init__({
            "clients": In(stream.Signature(Burst)).array(count),
            "chosen": Out(range(count)),
            "burst": Out(stream.Signature(Burst)),
        })

    def elaborate(self, platform):
        m = Module()
        latest, held = Signal.like(self.chosen), Signal.like(self.chosen)
        refused = Signal()
        for candidate in range(self._count):
            with m.If(latest == candidate):
                # Later statements win: the nearest successor comes last.
                for distance in range(self._count, 0, -1):
                    client = (candidate + distance) % self._count
                    with m.If(self.clients[client].valid):
                        m.d.comb += self.chosen.eq(client)
        with m.If(refused):
            m.d.comb += self.chosen.eq(held)
        clients = Array(self.clients)
        m.d.comb += [
            self.burst.valid.eq(Cat(c.valid for c in self.clients).any()),
            self.burst.payload.eq(clients[self.chosen].payload),
        ]
        for index, client in enumerate(self.clients):
            m.d.comb += client.ready.eq(self.burst.ready & (self.chosen == index))
        m.d.sync += [refused.eq(self.burst.valid & ~self.burst.ready), held.eq(self.chosen)]
        with m.If(self.burst.valid & self.burst.ready):
            m.d.sync += latest.eq(self.chosen)
        return m


class BurstOrder(wiring.Component):
    """Remembers whose the words of the bursts in flight are, and how many.

    A burst can be popped word by word from the cycle after next on; no gap between bursts. `depth`
    bursts wait behind the one whose words are due.

    Members
    -------
    burst : In(stream.Signature(StructLayout({"client": range(count), "beats": 13})))
    active : Out(1)
        There is a burst whose words are due.
    client : Out(range(count))
        Whose they are.
    moved : In(1)
        One of them moves in this cycle.
    """

    def __init__(self, count: int, depth: int):
        self.depth = depth
        self._layout = data.StructLayout({"client": range(count), "beats": 13})
        super().__init__({
            "burst": In(stream.Signature(self._layout)),
            "active": Out(1), "client": Out(range(count)), "moved": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.order = order = fifo.SyncFIFO(
            width=self._layout.size, depth=self.depth)
        following = data.View(self._layout, order.r_data)
        left = Signal(len(following.beats))  # words of the burst whose words are due
        final = Signal()  # left == 1
        takes = ~self.active | (self.moved & final)
        m.d.comb += [
            order.w_data.eq(self.burst.payload), order.w_en.eq(self.burst.valid),
            self.burst.ready.eq(order.w_rdy), order.r_en.eq(takes),
        ]
        with m.If(takes):
            m.d.sync += [self.active.eq(order.r_rdy), self.client.eq(following.client),
                         left.eq(following.beats), final.eq(following.beats == 1)]
        with m.Elif(self.moved):
            m.d.sync += [left.eq(left - 1), final.eq(left == 2)]
        return m


class MemoryArbiter(wiring.Component):
    """Shares a memory port between clients: round robin per burst, reads apart from writes.

    Bursts pass in `RegisterSlice.LATENCY` cycles, data in none; there is no gap between bursts that
    are waiting. Data move in the order of the bursts: a client that refuses its read data, or does
    not send the data of a write it has asked for, holds the other clients' bursts of that direction.
    So a client must not ask before it can take or give the data without help from another client. At
    most `BURSTS_IN_FLIGHT` bursts of a direction wait for their data.

    Parameters
    ----------
    bus_bytes : width of all ports in bytes.
    count : number of clients, at least 2.

    Members
    -------
    clients : In(MemoryPort(bus_bytes)).array(count)
    memory : Out(MemoryPort(bus_bytes))
    """

    def __init__(self, bus_bytes: int, count: int):
        if count < 2:
            raise ValueError(f"Number of clients must be at least 2, not {count!r}. "
                             f"Connect a single client directly.")
        self._count = count
        super().__init__({
            "clients": In(MemoryPort(bus_bytes)).array(count),
            "memory": Out(MemoryPort(bus_bytes)),
        })

    def elaborate(self, platform):
        m = Module()
        clients, memory = self.clients, self.memory

        m.submodules.reads = reads = BurstOrder(self._count, BURSTS_IN_FLIGHT)
        m.submodules.writes = writes = BurstOrder(self._count, BURSTS_IN_FLIGHT)
        m.submodules.acknowledgements = acknowledgements = fifo.SyncFIFOBuffered(
            width=len(writes.client), depth=BURSTS_IN_FLIGHT)
        writer = self._admit(m, "write", [writes.burst.ready, acknowledgements.w_rdy],
                             [writes.burst.valid, acknowledgements.w_en], writes.burst.payload)
        self._admit(m, "read", [reads.burst.ready], [reads.burst.valid], reads.burst.payload)

        m.d.comb += [
            memory.read_data.ready.eq(
                reads.active & Array(c.read_data.ready for c in clients)[reads.client]),
            reads.moved.eq(memory.read_data.valid & memory.read_data.ready),
            memory.write_data.valid.eq(
                writes.active & Array(c.write_data.valid for c in clients)[writes.client]),
            memory.write_data.payload.eq(
                Array(c.write_data.payload for c in clients)[writes.client]),
            writes.moved.eq(memory.write_data.valid & memory.write_data.ready),
            acknowledgements.w_data.eq(writer),
            acknowledgements.r_en.eq(memory.written),
        ]
        for index, client in enumerate(clients):
            m.d.comb += [
                client.read_data.payload.eq(memory.read_data.payload),
                client.read_data.valid.eq(
                    memory.read_data.valid & reads.active & (reads.client == index)),
                client.write_data.ready.eq(
                    memory.write_data.ready & writes.active & (writes.client == index)),
                client.written.eq(memory.written & (acknowledgements.r_data == index)),
            ]
        return m

    def _admit(self, m, direction, rooms, pushes, record):
        """Pass bursts on to memory while all of `rooms`; each raises `pushes` and is noted down in
        `record`. Returns the chosen client."""
        m.submodules[f"{direction}_robin"] = robin = RoundRobin(self._count)
        for index, client in enumerate(self.clients):
            wiring.connect(m, wiring.flipped(getattr(client, f"{direction}_command")),
                           robin.clients[index])
        # No client waits in the same cycle for the memory, nor for another client's burst.
        m.submodules[f"{direction}_slice"] = passed = RegisterSlice(Burst)
        wiring.connect(m, passed.output,
                       wiring.flipped(getattr(self.memory, f"{direction}_command")))
        room = Cat(rooms).all()
        m.d.comb += [
            passed.input.payload.eq(robin.burst.payload),
            passed.input.valid.eq(robin.burst.valid & room),
            robin.burst.ready.eq(passed.input.ready & room),
            record.client.eq(robin.chosen),
            record.beats.eq(robin.burst.p.beats),
        ]
        m.d.comb += [push.eq(robin.burst.valid & robin.burst.ready) for push in pushes]
        return robin.chosen
