"""A simulation that ends: every bench under a watchdog."""

from amaranth.sim import Simulator


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
