"""The engine that executes LINEAR."""

from amaranth import Cat, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from ..arch.config import Config
from ..arch.isa import Opcode, Target
from ..interfaces import (
    READ_LATENCY,
    Corrections,
    EngineSignature,
    Logits,
    QueuePort,
    ReadPort,
    RouteSetup,
    TableWrite,
    WritePort,
    activation_address,
    fields_layout,
    parameter_layout,
)
from ..slices import RegisterSlice
from .array import DotArray
from .drain import Drain
from .fill import Fill
from .issue import Issue
from .jobs import IN_FLIGHT, JobQueue
from .parameters import Parameters
from .rows import RowAddresses
from .scale import Scale
from .writeback import WriteBack

__all__ = ["LinearUnit"]


class LinearUnit(wiring.Component):
    """Matrix products of token rows, as LINEAR of `arch.isa` says, in the arithmetic of
    `arch.numerics`; T, O, K and W are the `tokens`, `outputs`, `depth` and `lanes` of the
    configuration.

    For each row and channel: the int32 sum (it wraps) of ``source_words * K`` products, plus the
    bias; then requantised to int8 and perhaps looked up in a table (ACTIVATION), or requantised to
    int16, perhaps weighted, and written or added with saturation (RESIDUAL), or sent as it is
    (ROUTER). With `product`, pairs of words of W results become one word (ACTIVATION). `gather`,
    `scatter` and `gated` have a meaning only with `queued`. Without rows, channels or source words an
    instruction does nothing, and no setup is sent to the router.

    Throughput: a group of T rows takes ``source_words`` cycles for each O channels, or the number
    of its write-back words, ``rows * ceil(channels / W)`` with O and T replaced by what is left in
    ragged groups (a pair is two words), whichever is more. No cycle is lost between output groups,
    token groups or instructions, as long as the rows of a group (``source_words`` cycles each, at least 2, and 3
    more for all) are fetched while the group before is at work, and every instruction is taken
    ``RowAddresses.LATENCY + 5`` cycles (READ_LATENCY more if `queued`) before its first row is due.
    A single instruction of one word and group takes 2 cycles, and instructions are taken every 2
    cycles at best, after a `queued` one 5. Additions to the residual stream hold back the last
    result of an instruction for another memory, by READ_LATENCY + 4 cycles unless `residual_write`
    refuses; the buffer takes that up unless write-back is the limit.

    Order: up to `IN_FLIGHT` instructions are at work at once, and end in order. Within a memory
    results are written, and additions made, in the order of instructions; sources, weights,
    parameters and queues are read ahead of that. An instruction for the router overlaps the one before up to its
    first result, and the next is taken when the router has finished.

    Latency: a lone instruction takes, from the cycle in which it is taken to that of `done`,
    besides the fetch of the first group, the products, and the write-back of the last output group,
    `overhead` cycles, and more where asked for: 1 into the activation or residual memory,
    ``READ_LATENCY + 3`` to accumulate, 3 for `queued`. With the router it is done in the cycle of `route_done`.

    Stalls: every port may refuse for any time; a refused write stops the array only when the
    write-back buffer is full, and a refused fetch only when its group is due.

    Members
    -------
    engine : Out(EngineSignature(Opcode.LINEAR))
    activation_read : Out(ReadPort(8 * K, activation_address(config)))
    activation_write : Out(WritePort(8, K, activation_address(config)))
    residual_read : Out(ReadPort(16 * W))
    residual_write : Out(WritePort(16, W))
    weight_read : Out(ReadPort(8 * O * K))
        Its address must always be accepted.
    param_read : Out(ReadPort(parameter_layout(config)))
    table_write : In(stream.Signature(TableWrite, always_ready=True))
        Entries of the pointwise tables; not while an instruction that uses the table is at work.
    queue : Out(QueuePort())
    route : Out(stream.Signature(RouteSetup))
    logits : Out(stream.Signature(Logits(config)))
    corrections : Out(stream.Signature(Corrections(config), always_ready=True))
        With `config.router_forms`: parameters of the channels whose logits follow.
    route_done : In(1)
        One cycle, when the router has finished the rows of its last setup.
    """

    def __init__(self, config: Config):
        self.config = config
        self.array, self.scale = DotArray(config), Scale(config)
        self.overhead = (RowAddresses.LATENCY + RegisterSlice.LATENCY + READ_LATENCY
                         + self.array.latency + self.scale.latency + 4)
        # Enough for results to arrive and be written at full rate while the next output group is
        # already on its way through the array.
        in_flight = self.array.latency + self.scale.latency + 10
        self.buffer = 1 << (in_flight - 1).bit_length()
        super().__init__({
            "engine": Out(EngineSignature(Opcode.LINEAR)),
            "activation_read": Out(ReadPort(8 * config.depth, activation_address(config))),
            "activation_write": Out(WritePort(8, config.depth, activation_address(config))),
            "residual_read": Out(ReadPort(16 * config.lanes)),
            "residual_write": Out(WritePort(16, config.lanes)),
            "weight_read": Out(ReadPort(8 * config.outputs * config.depth)),
            "param_read": Out(ReadPort(parameter_layout(config))),
            "table_write": In(stream.Signature(TableWrite, always_ready=True)),
            "queue": Out(QueuePort()),
            "route": Out(stream.Signature(RouteSetup)),
            "logits": Out(stream.Signature(Logits(config))),
            "route_done": In(1),
        } | ({"corrections": Out(stream.Signature(Corrections(config), always_ready=True))}
             if config.router_forms else {}))

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.rows = rows = RowAddresses(config)
        m.submodules.fill = fill = Fill(config)
        m.submodules.array = array = self.array
        m.submodules.issue = issue = Issue(config, self.buffer)
        m.submodules.parameters = parameters = Parameters(config)
        m.submodules.drain = drain = Drain(config, parameters.depth)
        m.submodules.scale = scale = self.scale
        m.submodules.writeback = writeback = WriteBack(config, self.buffer)

        start, fields = Signal(), Signal(fields_layout(Opcode.LINEAR))
        for part in (rows, issue, parameters, drain):
            name = type(part).__name__.lower()
            job = part.jobs.payload.shape()
            m.submodules[f"{name}_jobs"] = jobs = JobQueue(job)
            m.d.comb += [jobs.put.valid.eq(start), *(jobs.put.payload[field].eq(fields[field])
                                                     for field, _ in job)]
            connect(m, jobs.take, part.jobs)
        self._control(m, start, fields, ended=writeback.ended)

        connect(m, rows.rows, fill.rows)
        connect(m, parameters.tails, issue.tails)
        for inner, outer in (
                (rows.index, self.queue.index), (fill.read, self.activation_read),
                (parameters.read, self.param_read), (writeback.logits, self.logits),
                (writeback.activation_write, self.activation_write),
                (writeback.residual_read, self.residual_read),
                (writeback.residual_write, self.residual_write)):
            connect(m, inner, flipped(outer))
        connect(m, flipped(self.queue.entry), rows.entry)
        connect(m, flipped(self.table_write), scale.table_write)
        placed = drain.valid
        if config.products:
            placed = drain.valid & ~drain.mode.hold
            m.d.comb += writeback.spare.eq(drain.valid & drain.mode.hold)
        m.d.comb += [
            issue.filled.eq(fill.filled), issue.counts.eq(fill.counts), issue.ends.eq(fill.ends),
            fill.release.eq(issue.release), drain.target.eq(fill.target),
            fill.drained.eq(drain.drained),
            issue.ready.eq(parameters.ready),

            self.weight_read.address.valid.eq(issue.work.enable),
            self.weight_read.address.payload.eq(issue.weight),
            array.tile.eq(fill.tile), array.work.eq(issue.work),
            array.weights.eq(self.weight_read.data.payload),

            drain.load.eq(array.load), drain.space.eq(writeback.has_space),
            issue.written.eq(writeback.written), issue.held.eq(drain.held),
            writeback.reserve.eq(drain.stepped),
            array.row.eq(drain.row), array.word.eq(drain.word),
            parameters.at.eq(drain.parameter), parameters.release.eq(drain.release),

            scale.valid.eq(drain.valid), scale.mode.eq(drain.mode), scale.values.eq(array.results),
            scale.channels.eq(parameters.word), scale.weight.eq(drain.weight),
            writeback.place_valid.eq(placed), writeback.place.eq(drain.place),
            writeback.results_valid.eq(scale.results_valid), writeback.results.eq(scale.results),
        ]

        if config.router_forms:
            self._correct(m, drain, parameters.word)

        # Known a cycle late: what every port does reaches here from all over the device.
        ports = (self.activation_read.address, self.activation_write.write,
                 self.residual_read.address, self.residual_write.write,
                 self.param_read.address, self.logits, self.route)
        refused, works = Signal(len(ports)), Signal()
        m.d.sync += [refused.eq(Cat(port.valid & ~port.ready for port in ports)),
                     works.eq(issue.work.enable | drain.stepped)]
        m.d.comb += self.engine.stalled.eq(refused.any() & ~works)
        return m

    def _correct(self, m, drain, channels):
        """Sends what stands in the place of a scale with what goes to the router."""
        payload = self.corrections.p
        m.d.sync += [
            self.corrections.valid.eq(drain.valid & (drain.mode.target == Target.ROUTER)),
            payload.channel.eq(drain.place.channel),
            *(value.eq(Cat(channel.multiplier, channel.shift))
              for value, channel in zip(payload["values"], channels)),
        ]

    def _control(self, m, start, fields, ended):
        """Takes instructions, starts the parts, and says when an instruction is done."""
        engine, instruction = self.engine, self.engine.instruction
        in_flight, wait = Signal(range(IN_FLIGHT + 1)), Signal(2)
        nothing = Signal()  # there is nothing to do
        m.d.comb += [
            self.queue.expert.eq(fields.expert),
            self.route.p.rows.eq(fields.rows), self.route.p.token.eq(fields.destination),
            self.route.p.append.eq(fields.append), self.route.p.experts.eq(fields.channels),
            self.route.p.chosen.eq(fields.chosen), self.route.p.over_chosen.eq(fields.over_chosen),
            self.route.p.multiplier.eq(fields.multiplier), self.route.p.shift.eq(fields.shift),
            self.route.p.sigmoid.eq(fields.sigmoid), self.route.p.by_score.eq(fields.by_score),
            self.route.p.group.eq(fields.group), self.route.p.pair.eq(fields.pair),
            self.route.p.chosen_groups.eq(fields.chosen_groups),
            self.route.p.sparse.eq(fields.sparse), self.route.p.threshold.eq(fields.threshold),
        ]
        with m.If(ended):
            m.d.comb += engine.done.eq(1)

        with m.FSM():
            with m.State("Idle"):
                m.d.comb += instruction.ready.eq(in_flight != IN_FLIGHT)
                m.d.sync += [
                    fields.eq(instruction.payload), wait.eq(2),
                    nothing.eq((instruction.p.channels == 0) | (instruction.p.source_words == 0)
                               | ((instruction.p.rows == 0) & ~instruction.p.queued)),
                ]
                with m.If(instruction.valid & instruction.ready):
                    m.next = "Begin"
                    with m.If(instruction.p.queued):
                        m.next = "Length"
            with m.State("Length"):
                m.d.sync += [wait.eq(wait - 1), fields.rows.eq(self.queue.length)]
                with m.If(wait == 0):
                    m.d.sync += nothing.eq(nothing | (self.queue.length == 0))
                    m.next = "Begin"
            with m.State("Begin"):
                with m.If(nothing):
                    # Only to be done in order.
                    with m.If(in_flight == 1):
                        m.d.comb += engine.done.eq(1)
                        m.next = "Idle"
                with m.Elif(fields.target == Target.ROUTER):
                    m.d.comb += [self.route.valid.eq(1), start.eq(self.route.ready)]
                    with m.If(start):
                        m.next = "Route"
                with m.Else():
                    m.d.comb += start.eq(1)
                    m.next = "Idle"
            with m.State("Route"):
                with m.If(self.route_done):
                    m.d.comb += engine.done.eq(1)
                    m.next = "Idle"
        taken = instruction.valid & instruction.ready
        m.d.sync += in_flight.eq(in_flight + taken - engine.done)
        m.d.comb += engine.busy.eq(in_flight != 0)
