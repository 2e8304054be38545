"""A simulation beside benches that never end, such as memories."""

from amaranth.sim import Simulator


def simulate_beside(background, dut, *benches, deadline=10_000):
    """`simulate`, with `background` benches that serve as long as `benches` run."""
    async def watchdog(ctx):
        for _ in range(deadline):
            await ctx.tick()
        raise AssertionError(f"No completion within {deadline} cycles")

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    for bench in benches:
        simulator.add_testbench(bench)
    for bench in (*background, watchdog):
        simulator.add_testbench(bench, background=True)
    simulator.run()
