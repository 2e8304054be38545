"""On-chip memories: banks of block RAM that several readers and writers share."""

from functools import reduce
from operator import or_

from amaranth import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .interfaces import READ_LATENCY, BankedAddress, ReadPort, WritePort

__all__ = ["BankedMemory", "FairArbiter", "pieces"]

PIECE_WORDS = 512  # of the widest block RAM of ECP5
MOST_PIECES = 3


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


def pieces(words: int) -> list[range]:
    """The words of each of the parts that a bank is made of: few powers of two and a rest, so that
    block RAMs are deep and hardly a word is chosen among several."""
    found, first = [], 0
    while first < words:
        size = 1 << ((words - first).bit_length() - 1)
        if size < PIECE_WORDS or len(found) == MOST_PIECES - 1:
            size = words - first
        found.append(range(first, first + size))
        first += size
    return found


class BankedMemory(wiring.Component):
    """`banks` x `words` words of `cells` cells, shared by readers and writers.

    Word a lies in bank ``a // words``. Each bank serves one reader and one writer per cycle and
    different banks serve different clients in the same cycle; where several want one bank,
    `FairArbiter` chooses. A word arrives `READ_LATENCY` cycles after its address is accepted: one
    in which the arbiter's choice reaches registers, one in a register between the clients and the
    many block RAMs of a bank, one in these, one in registers behind, which keep their long
    clock-to-output time off every other path, and one in which the word is chosen among them. A read
    sees each write that was accepted in an earlier cycle, but of one in the same cycle anything
    between the two words: so no logic guards against it (`no_rw_check`). Nothing ever stalls a word
    that is under way. Words start as zeros.

    `address` is the shape of addresses: by default ``BankedAddress(banks, words)``, or plain numbers
    where there is one bank.

    Members
    -------
    readers : In(ReadPort(shape, address)).array(readers)
    writers : In(WritePort(cell_bits, cells, address)).array(writers)
    """

    def __init__(self, *, cell_bits: int, cells: int, words: int, banks: int = 1, readers: int = 1,
                 writers: int = 1, shape=None, address=None):
        self.cell_bits, self.cells, self.words, self.banks = cell_bits, cells, words, banks
        self._banked = BankedAddress(banks, words)
        if address is None:
            address = self._banked if banks > 1 else unsigned(20)
        shape = unsigned(cell_bits * cells) if shape is None else shape
        super().__init__({"readers": In(ReadPort(shape, address)).array(readers),
                          "writers": In(WritePort(cell_bits, cells, address)).array(writers)})

    def elaborate(self, platform):
        m = Module()
        read_banks, read_words = zip(*(self._split(m, f"read_{i}", port.address.payload)
                                       for i, port in enumerate(self.readers)))
        write_banks, write_words = zip(*(self._split(m, f"write_{i}", port.write.p.address)
                                         for i, port in enumerate(self.writers)))
        written = [(_registered(m, f"written_{i}", port.write.p.data),
                    _registered(m, f"mask_{i}", port.write.p.mask))
                   for i, port in enumerate(self.writers)]
        read_grants = [[] for _ in self.readers]
        write_grants = [[] for _ in self.writers]
        outputs = []
        for number in range(self.banks):
            reads = self._arbitrate(m, f"read_grants_{number}", read_grants,
                                    [port.address.valid & bank[number]
                                     for port, bank in zip(self.readers, read_banks)])
            writes = self._arbitrate(m, f"write_grants_{number}", write_grants,
                                     [port.write.valid & bank[number]
                                      for port, bank in zip(self.writers, write_banks)])
            outputs.append(self._bank(
                m, number, self._banked.within(_select(reads, read_words), number),
                self._banked.within(_select(writes, write_words), number),
                _select(writes, [data for data, _ in written]),
                _select(writes, [mask for _, mask in written], always=False)))

        for port, granted, bank in zip(self.readers, read_grants, read_banks):
            accepted = Cat(granted).any()
            arrives = accepted
            for stage in range(READ_LATENCY):
                bank = _registered(m, f"bank_{stage}", bank)
                arrives = _registered(m, f"valid_{stage}", arrives, reset_less=False)
            m.d.comb += [port.address.ready.eq(accepted), port.data.valid.eq(arrives),
                         Value.cast(port.data.payload).eq(_select(bank, outputs))]
        for port, granted in zip(self.writers, write_grants):
            m.d.comb += port.write.ready.eq(Cat(granted).any())
        return m

    def _split(self, m, name, address):
        """The bank of an address, one bit each, and a cycle later its word."""
        address = Value.cast(address)
        bank = address[20:] if self.banks > 1 else Const(1, 1)
        return bank, _registered(m, f"{name}_word", address[:20])

    def _arbitrate(self, m, name, granted, requests):
        """The grant of one side of a bank to each client, a cycle late; without delay it is appended
        to `granted` by client."""
        if len(requests) == 1:
            grants = requests
        else:
            m.submodules[name] = arbiter = FairArbiter(len(requests))
            m.d.comb += arbiter.request.eq(Cat(requests))
            grants = list(arbiter.grant)
        for client, grant in zip(granted, grants):
            client.append(grant)
        return list(_registered(m, name, Cat(grants), reset_less=False))

    def _bank(self, m, number, read_word, write_word, write_data, write_mask):
        """The block RAMs of a bank; returns the word that was read, 4 cycles later."""
        address = _registered(m, f"read_address_{number}", read_word)
        target = _registered(m, f"write_address_{number}", write_word)
        value = _registered(m, f"write_data_{number}", write_data)
        words = []
        for place, piece in enumerate(pieces(self.words)):
            memory = Memory(shape=unsigned(len(value)), depth=max(2, len(piece)), init=[],
                            attrs={"no_rw_check": 1})
            m.submodules[f"bank_{number}_{place}"] = memory
            read = memory.read_port(domain="comb")
            write = memory.write_port(granularity=self.cell_bits if self.cells > 1 else None)
            here = (write_word >= piece.start) & (write_word < piece.stop)
            m.d.comb += [
                read.addr.eq(address), write.addr.eq(target), write.data.eq(value),
                write.en.eq(_registered(m, f"write_{number}_{place}",
                                        write_mask & here.replicate(len(write_mask)))),
            ]
            # A register behind an asynchronous port becomes the RAM's own read port in synthesis;
            # only from this form does yosys drop the guard against collisions.
            word = _registered(m, f"word_{number}_{place}", read.data)
            words.append(_registered(m, f"found_{number}_{place}", word))
        chosen = words[0]
        for word, piece in zip(words[1:], pieces(self.words)[1:]):
            past = address >= piece.start
            for stage in range(2):
                past = _registered(m, f"past_{number}_{stage}", past)
            chosen = Mux(past, word, chosen)
        return _registered(m, f"output_{number}", chosen)


def _registered(m, name, value, *, reset_less=True):
    register = Signal(len(value), name=name, reset_less=reset_less)
    m.d.sync += register.eq(value)
    return register


def _select(grants: list[Value], values: list[Value], *, always: bool = True) -> Value:
    """The value of the client that was granted: an or of masked values, no priority chain. Without
    a grant it is 0, or where `always` and there is one client, its value."""
    if always and len(values) == 1:
        return values[0]
    return reduce(or_, (value & grant.replicate(len(value))
                        for grant, value in zip(grants, values)))
