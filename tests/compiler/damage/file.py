"""Damage to the bytes of a file, and to what it says of the bytes beside it."""

import onnx
from onnx import TensorProto, helper

from .kinds import EXTREMES, HUGE, Unfit, damage, pick, weights


@damage
def bit_flips(model, draw):
    data = bytearray(model.SerializeToString())
    reach = len(data) // draw.choice([1, 8])  # the nodes come first, then the weights
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    return bytes(data)


@damage
def truncation(model, draw):
    data = model.SerializeToString()
    return data[:draw.randrange(1, len(data))]


@damage
def spliced_bytes(model, draw):
    data = model.SerializeToString()
    first, second = sorted(draw.sample(range(len(data) // draw.choice([1, 8])), 2))
    return data[:first] + draw.choice([b"", draw.randbytes(8), 2 * data[first:second]]) + data[second:]


@damage
def length_of_2_gb(model, draw):
    data = model.SerializeToString()
    parts = [model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input]
    body = pick(draw, parts).SerializeToString()
    start = data.index(body)
    length = len(varint(len(body)))
    return data[:start - length] + varint(draw.choice([2**31 - 1, 2**31, 2**63])) + data[start:]


def varint(number: int) -> bytes:
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


@damage
def text(model, draw):
    if model.ByteSize() > 4000:
        raise Unfit
    data = onnx.printer.to_text(model)
    first, second = sorted(draw.sample(range(len(data)), 2))
    second = min(second, first + draw.randint(1, 12))
    middle = draw.choice(["", "{", ">", "-1", "99999999999999999999", "é\0", data[first:second] * 2])
    return (data[:first] + middle + data[second:]).encode()


@damage
def external_data(model, draw):
    tensor = pick(draw, weights(model))
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = ["weights.bin", "sparse.bin", "../outside.bin", "/dev/zero", "/etc/hostname", ".", "",
                "absent.bin", "a\0b", "x" * 5000]
    entries = {"location": draw.choice(location)}
    if draw.random() < 0.6:
        entries["length"] = draw.choice(["2147483648", "-1", "0", "many", str(2**70), "64"])
    if draw.random() < 0.4:
        entries["offset"] = draw.choice(["2147483648", "-1", "4", "", str(2**63)])
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    if draw.random() < 0.3:
        tensor.dims[0] = draw.choice(HUGE)


@damage
def versions(model, draw):
    if draw.random() < 0.5:
        model.opset_import[0].version = draw.choice([*EXTREMES, 9, 13, 19, 22, 24, 25])
    elif draw.random() < 0.5:
        model.ir_version = draw.choice([*EXTREMES, 3, 4, 8, 99])
    else:
        del model.opset_import[:]


@damage
def names(model, draw):
    name = draw.choice(["", "x" * 10**6, "a\nb\r", "'; --", "é\U0001f600", "../../x", "%s{0}", "\0"])
    choice = draw.randrange(3)
    if choice == 0:
        pick(draw, model.graph.node).name = name
    elif choice == 1:
        pick(draw, model.graph.input).name = name
    else:
        pick(draw, model.graph.node).output[0] = name


@damage
def recorded_shapes(model, draw):
    """``value_info`` that lies."""
    for node in model.graph.node:
        shape = [draw.choice([*EXTREMES, 3, "n"]) for _ in range(draw.randint(0, 4))]
        info = helper.make_tensor_value_info(node.output[0], draw.choice([1, 7, 11]), None)
        for size in shape:
            dim = info.type.tensor_type.shape.dim.add()
            setattr(dim, "dim_param" if isinstance(size, str) else "dim_value", size)
        model.graph.value_info.append(info)



@damage
def empty_parts(model, draw):
    fields = [model.graph.node, model.graph.output, model.graph.input, model.graph.initializer]
    del draw.choice(fields)[:]
