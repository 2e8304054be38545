import numpy as np
import pytest

from moeware.hw.arch.grid import Grid
from moeware.hw.arch.isa import Memory
from moeware.hw.arch.program import DeviceStep, HostStep, Port, Probe, Program, ProgramError, Region
from moeware.hw.arch.quantised import Affine, Linear, to_arrays

from .configs import CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.digest:08x}")
@pytest.mark.parametrize("memory", [Memory.ACTIVATION, Memory.RESIDUAL])
@pytest.mark.parametrize("groups", [1, 3])
def test_regions_round_trip(config, memory, groups):
    region = Region(memory=memory, rows=5, channels=21, address=64, groups=groups)
    info = np.iinfo(region.dtype)
    values = np.random.default_rng(0).integers(info.min, info.max + 1, (5, 21))
    image = region.pack(config, values)
    assert len(image) == region.bytes(config)
    assert (region.unpack(config, image) == values).all()


def port(**fields):
    region = Region(memory=Memory.ACTIVATION, rows=6, channels=8, address=0)
    return Port(**{"name": "image", "tensor": "image", "shape": (2, 4, 6), "scale": 0.5,
                   "split": (2, 2, 2, 3, 2), "order": (1, 3, 0, 2, 4), "region": region} | fields)


def test_patches_are_row_major_with_channels_first():
    image = np.arange(48, dtype=np.float32).reshape(1, 2, 4, 6)
    rows = port(scale=1.0).quantise(image)[0]
    assert rows[4].tolist() == [14, 15, 20, 21, 38, 39, 44, 45]  # second row, second column
    assert (port(scale=1.0).dequantise(rows[None]) == image).all()


def test_quantise_rounds_ties_to_even_and_saturates():
    image = np.zeros((1, 2, 4, 6), np.float32)
    image[0, 0, 0, :4] = 0.25, 0.75, 1000, -1000
    integers = port().quantise(image)
    assert sorted(integers[integers != 0].tolist()) == [-128, 2, 127]


def program():
    affine = Affine(bias=np.arange(3, dtype=np.int32), multiplier=np.full(3, 9, np.uint16),
                    shift=np.full(3, 2, np.uint8))
    linear = Linear(name="l", output="y", source="image", weight=np.eye(3, 8, dtype=np.int8),
                    affine=affine, table=None)
    probe = Probe(name="l", tensor="y", region=port().region)
    return Program(
        config=CONFIGS[0], image=bytes(range(200)), dram_bytes=512, placement="fpga 1/1",
        steps=[DeviceStep(entry=64, inputs=[port()], outputs=[], operations=[linear],
                          probes=[probe], macs=144,
                          grids={"y": Grid(tensor="y", step=0.3, gain=np.array([0.1, 2 / 3]),
                                           columns=np.array([1, 0]), rows=6)}),
               HostStep(model=b"onnx", inputs=["y"], outputs=["z"], reasons={"n": "why"})],
        inputs=[("image", (2, 4, 6), "tensor(float)")], outputs=[("z", (3,), "tensor(float)")],
        metadata={"model": "m.onnx"})


def test_file_round_trip(tmp_path):
    saved = program()
    saved.save(tmp_path / "p.moe")
    read = Program.load(tmp_path / "p.moe")
    for name in ("config", "image", "dram_bytes", "inputs", "outputs", "placement", "metadata"):
        assert getattr(read, name) == getattr(saved, name)
    assert read.steps[1] == saved.steps[1]
    assert read.steps[0].inputs == saved.steps[0].inputs
    assert read.steps[0].probes == saved.steps[0].probes
    grid = read.steps[0].grids["y"]
    assert (grid.gain == [0.1, 2 / 3]).all() and (grid.columns == [1, 0]).all()
    assert grid.shift is None and (grid.tensor, grid.step, grid.rows) == ("y", 0.3, 6)
    before, after = {}, {}
    assert to_arrays(saved.steps[0].operations, before) == to_arrays(read.steps[0].operations, after)
    assert all((before[key] == after[key]).all() for key in before)
    assert [file.name for file in tmp_path.iterdir()] == ["p.moe"]


@pytest.mark.parametrize("damage, message", [
    (lambda raw: raw[:-1], "truncated or damaged"),
    (lambda raw: raw[:10], "must start with"),
    (lambda raw: b"", "must start with"),
    (lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:], "truncated or damaged"),
    (lambda raw: raw.replace(b"program 1", b"program 9"), "must start with"),
])
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "p.moe"
    program().save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ProgramError, match=message):
        Program.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.moe"
    path.write_bytes(b"old")
    broken = program()
    broken.metadata["model"] = object()
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_is_not_finite_is_refused():
    image = np.zeros((1, 2, 4, 6), np.float32)
    image[0, 1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="Tensor 'image' must be finite"):
        port().quantise(image)
