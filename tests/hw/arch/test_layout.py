import numpy as np
import pytest

from moeware.hw.arch import layout
from moeware.hw.arch.isa import Memory

from .configs import CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.digest:08x}")
@pytest.mark.parametrize("memory", list(Memory))
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_unpack_is_the_inverse_of_pack(config, memory, count):
    size = layout.word_bytes(config, memory)
    words = np.random.default_rng(count).integers(0, 256, (count, size), np.uint8)
    image = layout.pack(config, memory, words)
    assert len(image) == layout.beats(config, memory, count) * config.bus_bytes
    assert (layout.unpack(config, memory, image, count) == words).all()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.digest:08x}")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize("packed, reach", [(1, 8), (2, 2)])
def test_packed_weights_take_a_share_of_the_bus_words(config, count, packed, reach):
    size = layout.word_bytes(config, Memory.WEIGHT)
    words = np.random.default_rng(count).integers(-reach, reach, (count, size), np.int8).view(np.uint8)
    image = layout.pack(config, Memory.WEIGHT, words, packed)
    whole = layout.beats(config, Memory.WEIGHT, count)
    assert len(image) == layout.beats(config, Memory.WEIGHT, count, packed) * config.bus_bytes
    assert len(image) == -(-whole // 2 ** packed) * config.bus_bytes
    assert (layout.unpack(config, Memory.WEIGHT, image, count, packed) == words).all()


def test_fields_of_a_byte_are_bytes_of_one_bus_word_after_the_other():
    config = CONFIGS[0]  # a weight word takes four bus words of 8 bytes
    words = np.zeros((1, 32), np.int8)
    words[0, [0, 8, 16, 24]] = 1, -2, -1, 0
    words[0, 9] = 1
    assert layout.pack(config, Memory.WEIGHT, words.view(np.uint8), 2) == bytes(
        [0b00_11_10_01, 0b00_00_01_00, 0, 0, 0, 0, 0, 0])
    words[0, [8, 24]] = -7, 5
    assert layout.pack(config, Memory.WEIGHT, words.view(np.uint8), 1) == bytes(
        [0x91, 0x10, 0, 0, 0, 0, 0, 0, 0x5F, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("packed, value, message", [
    (1, 8, "into 4 bits must be between -8 and 7, not 8"),
    (1, -9, "into 4 bits must be between -8 and 7, not -9"),
    (2, 2, "into 2 bits must be between -2 and 1, not 2")])
def test_values_that_do_not_fit_are_refused(packed, value, message):
    words = np.full((1, layout.word_bytes(CONFIGS[0], Memory.WEIGHT)), value, np.int8)
    with pytest.raises(ValueError, match=message):
        layout.pack(CONFIGS[0], Memory.WEIGHT, words.view(np.uint8), packed)


def test_narrow_words_share_a_bus_word_and_wide_ones_take_several():
    config = CONFIGS[-1]  # depth 6, bus 4: an activation word takes two bus words
    assert layout.pack(config, Memory.ACTIVATION, np.arange(6, dtype=np.uint8)[None]) == \
        bytes([0, 1, 2, 3, 4, 5, 0, 0])
    assert layout.pack(config, Memory.TABLE, np.arange(5, dtype=np.uint8)[:, None]) == \
        bytes([0, 1, 2, 3, 4, 0, 0, 0])


def test_params_fill_up_with_harmless_records():
    config = CONFIGS[0]
    words = layout.pack_params(config, [-2], [65535], [47])
    record = words.reshape(-1).view(layout.PARAM)
    assert tuple(record[0]) == (-2, 65535, 47, 0)
    assert (record[1:]["multiplier"] == 0).all() and (record[1:]["shift"] == 1).all()
