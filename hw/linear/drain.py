"""The walk over the results of the array, on their way to write-back."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..arch.config import Config
from ..arch.isa import Target
from .fill import RowTarget, TargetWrite, groups_kept
from .jobs import job_layout, per_group

__all__ = ["Drain", "Mode", "Place"]


class Mode(data.StructLayout):
    """What is done to results on their way."""

    def __init__(self, config: Config):
        super().__init__({
            "target": Target,
            "look_up": 1,  # in table `table`
            "table": 4,
            "gate": 1,  # multiply by the gate weight
            # The first results of a pair are held, the second ones are multiplied by them.
            **({"hold": 1, "multiply": 1, "row": range(config.tokens)} if config.products else {}),
        })


class Place(data.StructLayout):
    """Where `lanes` results of one row go."""

    def __init__(self, config: Config):
        super().__init__({
            "target": Target,
            "accumulate": 1,
            "end": 1,  # these are the last of their instruction
            "address": 20,  # word in the target memory
            "part": range(config.depth // config.lanes),  # which `lanes` bytes of that word
            "mask": config.lanes,  # which results exist
            "row": 13,  # for the router
            "channel": 16,  # of the first result
        })


class Drain(wiring.Component):
    """Picks `lanes` results per cycle from the drain registers of the array: by instruction, within
    it by token group, within it by output group, within it by row, within it by channel, and only
    rows and words that exist.

    A step happens in every cycle in which results are there and `space` is given. Of results in
    pairs (LINEAR.product) only the second ones have a place.

    Members
    -------
    jobs : In(stream.Signature(job_layout(config, *JOB)))
        In time for the first results.
    target : In(TargetWrite(config))
    load : In(1)
        The results of the next output group are there in the next cycle.
    space : In(1)
    stepped : Out(1)
        Results were picked in this cycle.
    held : Out(1)
        Results are there, but no space.
    row : Out(range(tokens))
    word : Out(range(words))
        What is picked: row and word of the output group.
    parameter : Out(range(parameters))
        Position of the parameters of what is picked, as in `Parameters`.
    release : Out(1)
        The parameters of what is picked are not needed again.
    drained : Out(1)
        The last results of a token group were picked in this cycle.
    valid : Out(1)
        Results were picked one cycle ago.
    place : Out(Place(config))
        Where the results picked one cycle ago go.
    mode : Out(Mode(config))
    weight : Out(16)
        The gate weight of their row.
    """

    JOB = ("channels", "target", "tabled", "table", "queued", "gated", "accumulate", "narrow",
           "product")

    def __init__(self, config: Config, parameters: int):
        self.config = config
        words = (config.outputs // config.lanes) << config.narrow
        super().__init__({
            "jobs": In(stream.Signature(job_layout(config, *self.JOB))),
            "target": In(TargetWrite(config)),
            "load": In(1),
            "space": In(1),
            "stepped": Out(1),
            "held": Out(1),
            "row": Out(range(config.tokens)),
            "word": Out(range(words)),
            "parameter": Out(range(parameters)),
            "release": Out(1),
            "drained": Out(1),
            "valid": Out(1),
            "place": Out(Place(config)),
            "mode": Out(Mode(config)),
            "weight": Out(16),
        })

    def elaborate(self, platform):
        m = Module()
        config, job = self.config, self.jobs.payload
        lanes = config.lanes
        parts = config.depth // lanes

        row_bits = len(self.row)
        groups = groups_kept(config)
        m.submodules.targets = targets = Memory(shape=RowTarget, depth=groups << row_bits, init=[])
        write, read = targets.write_port(), targets.read_port(domain="comb")
        group, row, target = Signal(range(groups)), Signal(range(config.tokens)), read.data
        m.d.comb += [
            write.en.eq(self.target.enable), write.data.eq(self.target.target),
            write.addr.eq(Cat(self.target.row, self.target.group)),
            read.addr.eq(Cat(row, group)),
        ]

        held, active, finish = Signal(job.shape()), Signal(), Signal()  # the instruction in work
        m.d.comb += self.jobs.ready.eq(~active | finish)

        # Where in the row the walk is, and where every row of the output group starts.
        position = data.StructLayout({
            "parameter": self.parameter.shape(),
            "channel": 16,  # from channel 0
            "left": 16,  # channels from here on
            "final": 1,  # they are at most `lanes`
            "offset": 20,  # words from channel 0
            "part": range(parts),
            **({"second": 1} if config.products else {}),  # of a pair
        })
        at, after, begin, origin = (Signal(position, name=name)
                                    for name in ("at", "after", "begin", "origin"))
        single = Signal()  # a row of the instruction is one word
        word_full = Mux(held.target == Target.ACTIVATION, at.part == parts - 1, 1)
        m.d.comb += [
            origin.parameter.eq(after.parameter), origin.left.eq(held.channels),
            origin.final.eq(single),
            after.parameter.eq(at.parameter + 1), after.channel.eq(at.channel + lanes),
            after.left.eq(at.left - lanes), after.final.eq(at.left <= 2 * lanes),
            after.offset.eq(at.offset + word_full),
            after.part.eq(Mux(word_full, 0, at.part + 1)),
        ]
        if config.products:
            paired = Signal()  # so are the results of the instruction
            m.d.comb += after.second.eq(~at.second)
            with m.If(paired & ~at.second):
                m.d.comb += [after.offset.eq(at.offset), after.part.eq(at.part)]
            with m.If(self.jobs.valid & self.jobs.ready):
                m.d.sync += paired.eq(job.product & (job.target == Target.ACTIVATION))

        busy, word = Signal(), Signal.like(self.word)
        words = per_group(config, held, config.outputs // lanes)
        last_word = Signal()  # of the output group
        row_done, group_done = Signal(), Signal()
        m.d.comb += [
            self.stepped.eq(busy & self.space), self.held.eq(busy & ~self.space),
            row_done.eq(at.final | last_word),
            group_done.eq(row_done & target.last),
            self.row.eq(row), self.word.eq(word), self.parameter.eq(at.parameter),
            self.release.eq(self.stepped & target.last),
            self.drained.eq(self.stepped & group_done & at.final),
            finish.eq(self.drained & target.end),
        ]
        with m.If(self.stepped):
            m.d.sync += [at.eq(after), word.eq(word + 1), last_word.eq(word + 2 == words)]
            with m.If(row_done):
                m.d.sync += [word.eq(0), last_word.eq(words == 1), row.eq(row + 1), at.eq(begin)]
            with m.If(group_done):
                m.d.sync += [busy.eq(0), row.eq(0), at.eq(after), begin.eq(after)]
                with m.If(at.final):
                    m.d.sync += [at.eq(origin), begin.eq(origin), group.eq(group + 1)]
        with m.If(self.load):
            m.d.sync += busy.eq(1)
        short = Signal()
        m.d.comb += short.eq(job.channels <= lanes)
        with m.If(self.jobs.valid & self.jobs.ready):
            m.d.sync += [held.eq(job), active.eq(1), single.eq(short),
                         last_word.eq(per_group(config, job, config.outputs // lanes) == 1)]
            m.d.sync += [start for position in (at, begin) for start in (
                position.left.eq(job.channels), position.final.eq(short))]
        with m.Elif(finish):
            m.d.sync += active.eq(0)

        m.d.sync += [
            self.valid.eq(self.stepped),
            self.weight.eq(target.weight),
            self.mode.target.eq(held.target), self.mode.table.eq(held.table),
            self.mode.look_up.eq((held.target == Target.ACTIVATION) & held.tabled),
            self.mode.gate.eq((held.target == Target.RESIDUAL) & held.queued & held.gated),
            self.place.target.eq(held.target), self.place.accumulate.eq(held.accumulate),
            self.place.end.eq(finish),
            self.place.address.eq(target.destination + at.offset),
            self.place.part.eq(at.part),
            self.place.mask.eq(Cat(at.left > lane for lane in range(lanes))),
            self.place.row.eq(target.destination),
            self.place.channel.eq(at.channel),
        ]
        if config.products:
            m.d.sync += [self.mode.hold.eq(paired & ~at.second),
                         self.mode.multiply.eq(paired & at.second), self.mode.row.eq(row)]
            with m.If(paired & at.second):
                m.d.sync += self.mode.look_up.eq(0)
        return m
