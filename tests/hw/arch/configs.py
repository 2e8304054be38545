"""Configurations that tests share: even ones, ragged ones, the smallest."""

from moeware.hw.arch.config import Config

_SIZES = {"activation_banks": 4, "activation_words": 1024, "residual_words": 4096,
          "weight_words": 1024, "param_words": 512, "tables": 4, "row_words": 128, "max_rows": 64,
          "max_experts": 16, "max_chosen": 4, "queue": 4}


def config(tokens, outputs, depth, queries, lanes, bus_bytes, **sizes) -> Config:
    return Config(tokens=tokens, outputs=outputs, depth=depth, queries=queries, lanes=lanes,
                  bus_bytes=bus_bytes, **_SIZES | sizes)


CONFIGS = [
    config(2, 4, 8, 2, 2, 8),
    config(1, 2, 2, 1, 1, 2, activation_words=4096, residual_words=8192, weight_words=2048,
           row_words=512),  # 4 products a cycle
    config(4, 8, 16, 4, 4, 16),  # 512
    config(2, 16, 8, 1, 8, 32),
    config(5, 3, 4, 3, 1, 8),
    config(3, 5, 6, 2, 1, 4, activation_banks=3, activation_words=1500, tables=2, queue=2),
]
