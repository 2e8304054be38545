import random

import pytest

from moeware.hw.arch import isa
from moeware.hw.arch.isa import Instruction, Opcode


@pytest.mark.parametrize("opcode", list(Opcode))
def test_fields_fit_an_instruction(opcode):
    assert sum(width for _, width in isa.HEADER + isa.FIELDS[opcode]) <= 8 * isa.BYTES


@pytest.mark.parametrize("opcode", list(Opcode))
def test_decode_is_the_inverse_of_encode(opcode):
    draw = random.Random(int(opcode))
    fields = {name: draw.randrange(1 << width)
              for name, width in isa.HEADER[1:] + isa.FIELDS[opcode]}
    assert isa.decode(isa.encode(Instruction(opcode, fields))) == Instruction(opcode, fields)


def test_fields_lie_in_the_order_of_the_table():
    raw = isa.encode(Instruction(Opcode.LOAD, {"memory": 5}))
    start = sum(width for _, width in isa.HEADER)
    assert int.from_bytes(raw, "little") >> start & 7 == 5


def test_missing_fields_are_zero():
    assert Instruction(Opcode.NORM, {}).rows == 0
    with pytest.raises(AttributeError, match="NORM has no field 'keys'"):
        assert Instruction(Opcode.NORM, {}).keys


@pytest.mark.parametrize("fields, message", [
    ({"rows": 1 << 13}, "LINEAR.rows must be between 0 and 8191, not 8192"),
    ({"rows": -1}, "LINEAR.rows must be between 0 and 8191, not -1"),
    ({"keys": 1}, "LINEAR must have the fields .* not 'keys'"),
])
def test_illegal_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Instruction(Opcode.LINEAR, fields)


@pytest.mark.parametrize("raw, message", [
    (b"", "32 bytes, not 0"),
    (bytes([5]) + bytes(31), "Opcode must be one of .*, not 5"),
    (bytes([7]) + bytes(30) + b"\1", "END must have zeros after its last field"),
])
def test_illegal_words_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        isa.decode(raw)
