"""The host's end of a `RegisterPort`."""

__all__ = ["access", "read", "write"]


async def access(ctx, port, *, write, index, data=0, patience=0):
    """One access to a register; the response is taken after `patience` cycles."""
    ctx.set(port.request.payload, {"write": write, "index": index, "data": data})
    ctx.set(port.request.valid, 1)
    await ctx.tick().until(port.request.ready)
    ctx.set(port.request.valid, 0)
    for _ in range(patience):
        await ctx.tick()
    ctx.set(port.response.ready, 1)
    value, = await ctx.tick().sample(port.response.payload).until(port.response.valid)
    ctx.set(port.response.ready, 0)
    return value


async def read(ctx, port, index, **keywords):
    return await access(ctx, port, write=0, index=index, **keywords)


async def write(ctx, port, index, data):
    await access(ctx, port, write=1, index=index, data=data)
