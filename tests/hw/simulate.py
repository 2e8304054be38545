"""What benches share: a simulation that ends, under a watchdog, and what addresses name."""

from amaranth.sim import Simulator


def word_at(address, config):
    """The word that an address names, plain or banked; a bank must be the word's."""
    if isinstance(address, int):
        return address
    bank = min(address.word // config.activation_words, config.activation_banks - 1)
    assert address.bank == 1 << bank
    return address.word


def simulate(dut, *benches, deadline=10_000):
    """Run every bench to completion; a stall fails after `deadline` cycles instead of hanging."""
    async def watchdog(ctx):
        for _ in range(deadline):
            await ctx.tick()
        raise AssertionError(f"No completion within {deadline} cycles")

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    for bench in benches:
        sim.add_testbench(bench)
    sim.add_testbench(watchdog, background=True)
    sim.run()
