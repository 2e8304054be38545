"""The accelerator: engines, memories, router and control, wired together."""

from collections.abc import Collection
from itertools import pairwise

from amaranth import Cat, Module, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from .arch.config import Config
from .arch.isa import Engine, Opcode
from .attention.unit import AttentionUnit
from .control import ControlUnit
from .dma import LoadEngine, ReadShare, StoreEngine
from .events import Events
from .fetch import Fetch
from .interfaces import activation_address, parameter_layout
from .linear.unit import LinearUnit
from .memories import BankedMemory
from .norm import NormUnit
from .ports import MemoryPort, RegisterPort
from .router import Router
from .sequencer import IN_FLIGHT, Sequencer, Tokens
from .slices import sliced

__all__ = ["Accelerator"]


class Accelerator(wiring.Component):
    """Runs programs of `arch.isa` that lie in the memory behind `memory`, as the registers of
    `arch.registers` say.

    A run begins with START and is done when END was dispatched, every engine is idle and every
    store was reported written. Its result does not depend on the timing of the memory, if the
    program orders by tokens what depends on each other. A run that cannot go on, because of an
    opcode that does not exist or because every engine waits for tokens that cannot come any more,
    ends with ERROR, after all instructions that can execute have done so. On-chip memories keep
    their contents from run to run; tokens, the router's queues and waiting
    instructions do not.

    Parameters
    ----------
    fabric : names of units of which all products are made of look-up tables, not of DSP blocks:
        "attention" or none

    Members
    -------
    memory : Out(MemoryPort(config.bus_bytes))
    registers : In(RegisterPort())
    events : Out(Events)
        For simulations; costs nothing where it is not connected.
    """

    def __init__(self, config: Config, *, fabric: Collection[str] = ()):
        if unknown := set(fabric) - {"attention"}:
            raise ValueError(f"Accelerator.fabric must name units of {{'attention'}}, "
                             f"not {sorted(unknown)}")
        self.config, self.fabric = config, fabric
        super().__init__({
            "memory": Out(MemoryPort(config.bus_bytes)),
            "registers": In(RegisterPort()),
            "events": Out(Events),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.load = load = LoadEngine(config)
        m.submodules.linear = linear = LinearUnit(config)
        m.submodules.attention = attention = AttentionUnit(
            config, primitive="fabric" if "attention" in self.fabric else None)
        m.submodules.norm = norm = NormUnit(config)
        m.submodules.store = store = StoreEngine(config)
        router = Router(config)
        control = ControlUnit(config)
        # A run must not see the queues of the one before. Its instructions come many cycles later, so
        # that there is time for the way to all registers.
        begins = [control.start, Signal(), Signal()]
        m.d.sync += [later.eq(sooner) for sooner, later in pairwise(begins)]
        m.submodules.router = ResetInserter(begins[-1])(router)
        m.submodules.control = control

        self._memories(m, load, linear, attention, norm, store)
        connect(m, load.table_write, linear.table_write)
        connect(m, linear.route, router.setup)
        connect(m, sliced(m, "logits", linear.logits), router.logits)
        if config.router_forms:
            connect(m, linear.corrections, router.corrections)
        connect(m, linear.queue, router.queue)
        m.d.comb += linear.route_done.eq(router.done)

        m.submodules.fetch = fetch = Fetch(config)
        self._bus(m, fetch, load, store)
        engines = {Engine.LOAD: load, Engine.LINEAR: linear, Engine.ATTENTION: attention,
                   Engine.NORM: norm, Engine.STORE: store}
        self._control(m, control, fetch, engines, router.empty)
        return m

    def _memories(self, m, load, linear, attention, norm, store):
        """The on-chip memories with everything that reads and writes them."""
        config = self.config
        clients = {
            "activation": (
                {"cell_bits": 8, "cells": config.depth, "words": config.activation_words,
                 "banks": config.activation_banks, "address": activation_address(config)},
                [linear.activation_read, attention.key_read, attention.value_read,
                 store.activation_read],
                [linear.activation_write, attention.activation_write, norm.activation_write,
                 load.activation_write]),
            "residual": (
                {"cell_bits": 16, "cells": config.lanes, "words": config.residual_words},
                [linear.residual_read, norm.residual_read, store.residual_read,
                 *([norm.factor_read] if config.rotary else [])],
                [linear.residual_write, load.residual_write]),
            "weight": (
                {"cell_bits": 8 * config.outputs * config.depth, "cells": 1,
                 "words": config.weight_words},
                [linear.weight_read], [load.weight_write]),
            "param": (
                {"cell_bits": 64 * config.lanes, "cells": 1, "words": config.param_words,
                 "shape": parameter_layout(config)},
                [linear.param_read, norm.param_read], [load.param_write]),
        }
        for name, (shape, readers, writers) in clients.items():
            m.submodules[name] = memory = BankedMemory(
                **shape, readers=len(readers), writers=len(writers))
            for client, port in zip(readers, memory.readers):
                connect(m, client, port)
            for client, port in zip(writers, memory.writers):
                connect(m, client, port)

    def _bus(self, m, fetch, load, store):
        """The memory port: fetch and LOAD read, STORE writes."""
        memory = self.memory
        m.submodules.share = share = ReadShare(self.config.bus_bytes)
        connect(m, fetch.read_command, share.urgent_command)
        connect(m, share.urgent_data, fetch.read_data)
        connect(m, load.read_command, share.other_command)
        connect(m, share.other_data, load.read_data)
        connect(m, share.command, flipped(memory.read_command))
        connect(m, flipped(memory.read_data), share.data)
        connect(m, store.write_command, flipped(memory.write_command))
        connect(m, store.write_data, flipped(memory.write_data))
        m.d.comb += store.written.eq(memory.written)

    def _control(self, m, control, fetch, engines, empty):
        """Registers, sequencers and tokens; start and end of a run."""
        memory = self.memory
        m.submodules.tokens = tokens = Tokens()
        connect(m, flipped(self.registers), control.registers)

        stuck, clear = Signal(), Signal()
        m.d.sync += clear.eq(control.start | stuck)
        sequencers = []
        for engine, unit in engines.items():
            name = engine.name.lower()
            sequencer = Sequencer(self.config, Opcode(engine))
            m.submodules[f"{name}_sequencer"] = sequencer
            sequencers.append(sequencer)
            connect(m, getattr(fetch, name), sequencer.queued)
            # A sequencer and its engine may lie far apart: registers both ways.
            connect(m, sliced(m, f"{name}_instruction", sequencer.engine.instruction),
                    unit.engine.instruction)
            m.d.sync += [sequencer.engine.done.eq(unit.engine.done),
                         sequencer.engine.stalled.eq(unit.engine.stalled)]
            # Busy from one to the other, as the events of both say.
            inside, sent = Signal(range(IN_FLIGHT + 1)), sequencer.engine.instruction
            m.d.sync += inside.eq(inside + (sent.valid & sent.ready) - sequencer.engine.done)
            m.d.comb += sequencer.engine.busy.eq(inside != 0)
            m.d.comb += [
                sequencer.available.eq(tokens.available[engine]),
                tokens.take[engine].eq(sequencer.take),
                tokens.add[engine].eq(sequencer.give),
                sequencer.empty.eq(empty),
                sequencer.clear.eq(clear),
                control.busy[engine].eq(sequencer.engine.busy),
                control.stalled[engine].eq(sequencer.engine.stalled),
                control.waiting[engine].eq(sequencer.waiting),
            ]
            self._watch(m, self.events.engines[engine], sequencer)

        idle = Cat(sequencer.idle for sequencer in sequencers)
        waiting = Cat(sequencer.waiting for sequencer in sequencers)
        # No engine works, so no token can come: whoever waits now would wait for ever, and a cycle
        # later too, which keeps this wide condition off the sequencers' paths.
        m.d.sync += stuck.eq((idle | waiting).all() & waiting.any()
                             & (fetch.idle | fetch.blocked))
        m.d.comb += [
            fetch.start.eq(control.start), fetch.program.eq(control.program), fetch.stop.eq(stuck),
            tokens.clear.eq(control.start),
            control.finished.eq(idle.all() & fetch.idle),
            control.error.eq(fetch.illegal | stuck),
            control.dispatched.eq(fetch.dispatched),
            control.read_beat.eq(memory.read_data.valid & memory.read_data.ready),
            control.write_beat.eq(memory.write_data.valid & memory.write_data.ready),
            self.events.start.eq(control.start), self.events.blocked.eq(fetch.blocked),
            self.events.read.eq(control.read_beat), self.events.write.eq(control.write_beat),
        ]

    def _watch(self, m, events, sequencer):
        """The events of one engine, as its sequencer sees them."""
        engine, instruction = sequencer.engine, sequencer.engine.instruction
        m.d.comb += [
            events.started.eq(instruction.valid & instruction.ready),
            events.skipped.eq(sequencer.skipped), events.done.eq(engine.done),
            events.busy.eq(engine.busy), events.stalled.eq(engine.stalled),
            events.waiting.eq(sequencer.waiting), events.lacking.eq(sequencer.lacking),
        ]
