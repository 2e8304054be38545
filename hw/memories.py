"""On-chip memories: banks of block RAM that several readers and writers share."""

from functools import reduce
from operator import or_

from amaranth import Array, Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .interfaces import READ_LATENCY, ReadPort, WritePort

__all__ = ["BankedMemory", "FairArbiter", "locate"]


class FairArbiter(wiring.Component):
    """Grants one of several requests per cycle, to the client that was served longest ago.

    Combinational, so that a request may be granted in the cycle it comes; no client that keeps
    asking waits for more than one grant of every other client.

    Members
    -------
    request : In(clients)
    grant : Out(clients)
        One bit at most, of a client that requests; each grant counts as service.
    """

    def __init__(self, clients: int):
        super().__init__({"request": In(clients), "grant": Out(clients)})

    def elaborate(self, platform):
        m = Module()
        clients = len(self.request)
        # older[a, b]: a was served before b, so it goes first. One bit for each pair.
        pairs = {(a, b): Signal(init=1, name=f"older_{a}_{b}")
                 for a in range(clients) for b in range(a + 1, clients)}

        def older(a, b):
            return pairs[a, b] if a < b else ~pairs[b, a]

        for client in range(clients):
            others = [other for other in range(clients) if other != client]
            held = Cat(self.request[other] & older(other, client) for other in others).any()
            m.d.comb += self.grant[client].eq(self.request[client] & ~held)
            with m.If(self.grant[client]):
                m.d.sync += [pair.eq(client == b) for (a, b), pair in pairs.items()
                             if client in (a, b)]
        return m


def locate(address: Value, banks: int, words: int) -> tuple[Value, Value]:
    """Bank and word within it of a linear address; `words` need not be a power of two. An address
    past the end falls somewhere into the memory: it is answered, with a word that means nothing."""
    width = max(words - 1, 1).bit_length()
    if banks == 1:
        return Const(0, 1), address[:width]
    bits = (banks - 1).bit_length()
    if words & (words - 1) == 0:
        bank = address[width:width + bits]
        if banks & (banks - 1):
            bank = Mux(bank >= banks, banks - 1, bank)
        return bank, address[:width]
    bank, offset = Const(0, bits), address
    for number in range(1, banks):
        past = address >= number * words
        bank = Mux(past, number, bank)
        offset = Mux(past, (address - number * words)[:width], offset[:width])
    return bank, offset[:width]


def _select(grants: list[Value], values: list[Value]) -> Value:
    """The value of the client that was granted: an or of masked values, no priority chain."""
    if len(values) == 1:
        return values[0]
    return reduce(or_, (value & grant.replicate(len(value))
                        for grant, value in zip(grants, values)))


class BankedMemory(wiring.Component):
    """`banks` x `words` words of `cells` cells, shared by readers and writers.

    Word a lies in bank ``a // words``. Each bank serves one reader and one writer per cycle and
    different banks serve different clients in the same cycle; where several want one bank,
    `FairArbiter` chooses. A word arrives `READ_LATENCY` cycles after its address is accepted: one
    in a register between the arbiter and the many block RAMs of a bank, one in them, one in a
    register behind, which keeps their long clock-to-output time off every other path. A read sees each write that was accepted in an earlier cycle, but
    of one in the same cycle anything between the two words: so no logic guards against it
    (`no_rw_check`). Nothing ever stalls a word that is under way. Words start as zeros.

    Members
    -------
    readers : In(ReadPort(shape)).array(readers)
    writers : In(WritePort(cell_bits, cells)).array(writers)
    """

    def __init__(self, *, cell_bits: int, cells: int, words: int, banks: int = 1, readers: int = 1,
                 writers: int = 1, shape=None):
        self.cell_bits, self.cells, self.words, self.banks = cell_bits, cells, words, banks
        shape = unsigned(cell_bits * cells) if shape is None else shape
        super().__init__({"readers": In(ReadPort(shape)).array(readers),
                          "writers": In(WritePort(cell_bits, cells)).array(writers)})

    def elaborate(self, platform):
        m = Module()
        read_banks = [locate(port.address.payload, self.banks, self.words)
                      for port in self.readers]
        write_banks = [locate(port.write.p.address, self.banks, self.words)
                       for port in self.writers]
        read_grants = [[] for _ in self.readers]
        write_grants = [[] for _ in self.writers]
        outputs = []

        for number in range(self.banks):
            width = self.cell_bits * self.cells
            memory = Memory(shape=unsigned(width), depth=self.words, init=[],
                            attrs={"no_rw_check": 1})
            m.submodules[f"bank_{number}"] = memory
            read = memory.read_port(domain="comb")
            write = memory.write_port(granularity=self.cell_bits if self.cells > 1 else None)

            grants = self._arbitrate(m, f"read_{number}", read_grants,
                                     [port.address.valid & (bank == number)
                                      for port, (bank, _) in zip(self.readers, read_banks)])
            address = Signal.like(read.addr, name=f"read_address_{number}", reset_less=True)
            m.d.sync += address.eq(_select(grants, [word for _, word in read_banks]))
            m.d.comb += read.addr.eq(address)
            # A register behind an asynchronous port becomes the RAM's own read port in synthesis;
            # only from this form does yosys drop the guard against collisions.
            word = Signal(width, name=f"word_{number}", reset_less=True)
            output = Signal(width, name=f"output_{number}", reset_less=True)
            m.d.sync += [word.eq(read.data), output.eq(word)]
            outputs.append(output)

            grants = self._arbitrate(m, f"write_{number}", write_grants,
                                     [port.write.valid & (bank == number)
                                      for port, (bank, _) in zip(self.writers, write_banks)])
            for target, values in (
                    (write.addr, [word for _, word in write_banks]),
                    (write.data, [port.write.p.data for port in self.writers]),
                    (write.en, [port.write.p.mask & grant.replicate(self.cells)
                                for port, grant in zip(self.writers, grants)])):
                register = Signal(len(target), name=f"write_{number}", reset_less=True)
                m.d.sync += register.eq(_select(grants, values))
                m.d.comb += target.eq(register)

        for port, granted, (bank, _) in zip(self.readers, read_grants, read_banks):
            accepted = Cat(granted).any()
            arrives = accepted
            for stage in range(READ_LATENCY):
                later, valid = Signal.like(bank, name=f"bank_{stage}"), Signal(name=f"valid_{stage}")
                m.d.sync += [later.eq(bank), valid.eq(arrives)]
                bank, arrives = later, valid
            m.d.comb += [port.address.ready.eq(accepted), port.data.valid.eq(arrives),
                         Value.cast(port.data.payload).eq(Array(outputs)[bank])]
        for port, granted in zip(self.writers, write_grants):
            m.d.comb += port.write.ready.eq(Cat(granted).any())
        return m

    def _arbitrate(self, m, name, granted, requests):
        """The grant of one side of a bank to each client; also appended to `granted` by client."""
        if len(requests) == 1:
            grants = requests
        else:
            m.submodules[name] = arbiter = FairArbiter(len(requests))
            m.d.comb += arbiter.request.eq(Cat(requests))
            grants = list(arbiter.grant)
        for client, grant in zip(granted, grants):
            client.append(grant)
        return grants
