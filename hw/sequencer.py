"""Sequencers, which start an engine's instructions in order, and the tokens they meet by."""

from amaranth import Array, Cat, Module, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from .arch.config import Config
from .arch.isa import TOKEN_LIMIT, Engine, Opcode
from .fetch import dispatched_layout
from .interfaces import EngineSignature

__all__ = ["IN_FLIGHT", "Sequencer", "Tokens"]

IN_FLIGHT = 8  # instructions that an engine may have taken and not done


class Tokens(wiring.Component):
    """Counts the tokens from each engine to each.

    A token that is added can be taken in the next cycle; an engine gives itself tokens, too. Adding to a counter that holds `TOKEN_LIMIT` is an error
    of the program; the token is lost.

    Members
    -------
    clear : In(1)
    add : In(data.ArrayLayout(5, 5))
        ``add[a][b]``: one token from engine a to engine b.
    take : In(data.ArrayLayout(5, 5))
        ``take[b][a]``: the same token; only where one is available.
    available : Out(data.ArrayLayout(5, 5))
        ``available[b][a]``: engine b can take a token of engine a.
    """

    add: In(data.ArrayLayout(len(Engine), len(Engine)))
    take: In(data.ArrayLayout(len(Engine), len(Engine)))
    clear: In(1)
    available: Out(data.ArrayLayout(len(Engine), len(Engine)))

    def elaborate(self, platform):
        m = Module()
        for source in Engine:
            for target in Engine:
                available = self.available[target][source]
                count = Signal(range(TOKEN_LIMIT + 1), name=f"{source.name}_{target.name}".lower())
                add, take = self.add[source][target], self.take[target][source]
                m.d.comb += available.eq(count != 0)
                with m.If(self.clear):
                    m.d.sync += count.eq(0)
                with m.Elif(add & ~take & (count != TOKEN_LIMIT)):
                    m.d.sync += count.eq(count + 1)
                with m.Elif(take & ~add):
                    m.d.sync += count.eq(count - 1)
        return m


class Sequencer(wiring.Component):
    """Starts the instructions of one engine in order, each once its tokens have come.

    At least `Config.queue` instructions can wait. The first takes its tokens all at once; if it is
    conditional, the queue of its expert is looked at in the cycle after. Then the engine gets the
    instruction, while earlier ones may still be executing there, or, where the expert's queue is
    empty, it is passed over. Tokens are given in the order of instructions, in the cycle after the
    engine's `done`. An instruction starts every three cycles at best.

    Members
    -------
    queued : In(stream.Signature(dispatched_layout(opcode)))
    engine : In(EngineSignature(opcode))
    available : In(5)
        Engines of which a token can be taken.
    take : Out(5)
    give : Out(5)
    empty : In(max_experts)
        Experts whose queue is empty.
    clear : In(1)
        Drops all instructions; only while the engine executes none.
    waiting : Out(1)
        The next instruction lacks a token, and no other is executing.
    idle : Out(1)
        No instruction is waiting, starting or executing.
    lacking : Out(5)
        Engines whose token the next instruction lacks.
    skipped : Out(1)
        Pulses for each instruction that is passed over.
    """

    def __init__(self, config: Config, opcode: Opcode):
        self.config, self.opcode = config, opcode
        super().__init__({
            "queued": In(stream.Signature(dispatched_layout(opcode))),
            "engine": In(EngineSignature(opcode)),
            "available": In(len(Engine)), "take": Out(len(Engine)), "give": Out(len(Engine)),
            "empty": In(config.max_experts), "clear": In(1),
            "waiting": Out(1), "idle": Out(1), "lacking": Out(len(Engine)), "skipped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        layout = dispatched_layout(self.opcode)
        # Whether there is room is known a cycle late, so that it needs a place more. Two at least: an
        # instruction that is dispatched should find one before it.
        depth = max(2, self.config.queue)
        m.submodules.queue = queue = SyncFIFO(width=layout.size, depth=depth + 1)
        m.d.comb += [queue.w_data.eq(self.queued.payload),
                     queue.w_en.eq(self.queued.valid & self.queued.ready)]
        m.d.sync += self.queued.ready.eq(queue.level < depth)

        head = Signal(layout)
        skip = Signal()
        started, started_room, started_any = self._retire(m, head["signal"], skip)
        lacking = head.wait & ~self.available
        m.d.comb += self.engine.instruction.payload.eq(head.fields)

        with m.FSM() as fsm:
            with m.State("EMPTY"):
                # Whether there is one is known too late to enable anything as wide as an instruction.
                m.d.comb += queue.r_en.eq(1)
                m.d.sync += head.eq(queue.r_data)
                with m.If(queue.r_rdy):
                    m.next = "TOKENS"
            with m.State("TOKENS"):
                m.d.comb += self.lacking.eq(lacking)
                with m.If(lacking == 0):
                    m.d.comb += self.take.eq(head.wait)
                    m.next = "START"
                    with m.If(head.conditional):
                        m.next = "EXPERT"
            with m.State("EXPERT"):
                m.d.sync += skip.eq(Array(self.empty)[head.fields.expert])
                m.next = "START"
            with m.State("START"):
                m.d.comb += [self.engine.instruction.valid.eq(started_room & ~skip),
                             started.eq(started_room & (skip | self.engine.instruction.ready)),
                             self.skipped.eq(started_room & skip)]
                with m.If(started):
                    m.d.sync += skip.eq(0)
                    m.next = "EMPTY"

        still = ~started_any & ~self.engine.busy
        m.d.comb += [
            self.idle.eq(fsm.ongoing("EMPTY") & ~queue.r_rdy & still),
            self.waiting.eq(fsm.ongoing("TOKENS") & (lacking != 0) & still),
        ]
        return ResetInserter(self.clear)(m)

    def _retire(self, m, signal, skip):
        """Gives the tokens of started instructions, in order. Returns: a signal that adds the
        instruction with mask `signal`; whether there is room; whether there is any."""
        m.submodules.started = started = SyncFIFO(width=len(signal) + 1, depth=IN_FLIGHT)
        done = Signal(range(IN_FLIGHT + 1))  # by the engine, tokens not yet given
        mask, skipped = started.r_data[:len(signal)], started.r_data[-1]
        gives = started.r_rdy & (skipped | (done != 0))
        m.d.comb += [started.w_data.eq(Cat(signal, skip)), started.r_en.eq(gives)]
        with m.If(gives):
            m.d.comb += self.give.eq(mask)
        m.d.sync += done.eq(done + self.engine.done - (gives & ~skipped))
        return started.w_en, started.w_rdy, started.r_rdy
