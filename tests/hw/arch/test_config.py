import dataclasses

import pytest

from moeware.hw.arch.config import Config, ConfigError

from .configs import CONFIGS


@pytest.mark.parametrize("field, value, message", [
    ("tokens", 0, "Config.tokens must be an integer between 1 and 64, not 0"),
    ("tokens", 2.0, "Config.tokens must be an integer between 1 and 64, not 2.0"),
    ("tokens", True, "Config.tokens must be an integer between 1 and 64, not True"),
    ("bus_bytes", 6, "Config.bus_bytes must be a power of two, not 6"),
    ("lanes", 3, "Config.lanes must divide Config.outputs = 4, not be 3"),
    ("max_chosen", 16, None),
    ("rotary", 1, None),
    ("rotary", 2, "Config.rotary must be an integer between 0 and 1, not 2"),
    ("max_experts", 2, "Config.max_chosen must be at most Config.max_experts = 2, not 4"),
])
def test_rules(field, value, message):
    if message is None:
        dataclasses.replace(CONFIGS[0], **{field: value})
    else:
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(CONFIGS[0], **{field: value})


def test_pairs_lie_in_one_word():
    with pytest.raises(ConfigError, match="lanes must be even where Config.rotary is 1, .* not 1"):
        dataclasses.replace(CONFIGS[1], rotary=1)


def test_digests_tell_configurations_apart():
    assert len({config.digest for config in CONFIGS}) == len(CONFIGS)
    assert Config.from_dict(CONFIGS[0].to_dict()).digest == CONFIGS[0].digest


def test_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match="exactly the fields"):
        Config.from_dict(CONFIGS[0].to_dict() | {"speed": 1})
