"""A simulation with benches that never end, such as memories and engines."""

from amaranth.sim import Simulator

__all__ = ["simulate_beside"]


def simulate_beside(dut, benches, background, deadline=30_000):
    """Run `benches` to completion beside those of `background`, under a watchdog."""
    async def watchdog(ctx):
        for _ in range(deadline):
            await ctx.tick()
        raise AssertionError(f"No completion within {deadline} cycles")

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    for bench in (*background, watchdog):
        sim.add_testbench(bench, background=True)
    for bench in benches:
        sim.add_testbench(bench)
    sim.run()
