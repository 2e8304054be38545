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
