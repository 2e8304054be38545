"""Routers with a capacity: who finds a place does not depend on how rows are cut and frames laid out."""

import dataclasses

import numpy as np
import pytest

from moeware.compiler.errors import CompileError
from moeware.compiler.tile import PLANS
from moeware.hw.arch.isa import Opcode, Target
from moeware.hw.arch.quantised import Route
from moeware.hw.arch.work import works
from moeware.runtime.chosen import chosen_experts
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.golden import GoldenDevice

from ..hw.arch import configs
from ..runtime.reference import evaluate
from .lowering import program, transformer
from .test_lowering import SIZES

EVEN, RAGGED = (dataclasses.replace(each, router_forms=1, max_rows=256, activation_words=2048,
                                       residual_words=4096)
                for each in (configs.CONFIGS[0], configs.CONFIGS[-1]))
LONG = {"tokens": 75, "depth": 5, "width": 3, "heads": 2, "hidden": 9}  # rows of more than one chunk
CASES = {
    "one place": dict(experts=5, chosen=2, capacity=1),
    "token by token": dict(experts=5, chosen=2, capacity=20),
    "first choices first": dict(experts=5, chosen=2, capacity=20, by_rank=True),
    "three choices, one place": dict(experts=6, chosen=3, capacity=1, by_rank=True),
    "one choice": dict(experts=4, chosen=1, capacity=11, by_rank=True),
    "all experts": dict(experts=3, chosen=3, capacity=30, by_rank=True),
    "all but one": dict(experts=4, chosen=2, capacity=74),
    "groups": dict(experts=8, chosen=3, form=5, capacity=9, by_rank=True),
}


def check(graph, config, count, **options):
    """The golden device and PyTorch against the reference, frame by frame; the program."""
    compiled, inputs = program(graph, config, **options), graph.integers(count)
    expected, (step,) = evaluate(graph.operations, inputs), compiled.steps
    route = next(op.output for op in graph.operations if isinstance(op, Route))
    assert (expected[route][..., 1] == 0).any()  # a token is dropped
    for device in (GoldenDevice(), TorchDevice()):
        found = device.run(compiled, step, inputs, probes=True)
        for tensor, values in found.items():
            np.testing.assert_array_equal(values, expected[tensor], err_msg=tensor)
    return compiled, inputs


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [EVEN, RAGGED], ids=["even", "ragged"])
def test_golden_and_pytorch_drop_the_same(config, case, frames):
    check(transformer(4, **LONG, **CASES[case]), config, frames + 1, frames=frames)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_work_counts_the_places(case, frames):
    """Every instruction's rows, by the chosen experts."""
    graph = transformer(4, **LONG, **CASES[case])
    compiled, inputs = check(graph, EVEN, frames, frames=frames)
    step = compiled.steps[0]
    (choices,) = chosen_experts(compiled, step, inputs)
    route = next(op for op in graph.operations if isinstance(op, Route))
    tensor = evaluate(graph.operations, inputs)[route.output]
    kept = np.bincount(tensor[..., 0][tensor[..., 1] > 0].ravel(), minlength=len(route.weight))
    assert (kept <= frames * route.capacity).all()
    for chosen in (choices, None):
        work = works(compiled, step, chosen)
        queued = {w.instruction.expert: w.rows for w in work if w.instruction.opcode is Opcode.LINEAR
                  and w.instruction.queued}
        assert max(queued.values()) <= frames * route.capacity
        if chosen is not None:
            assert [queued.get(e, 0) for e in range(len(kept))] == kept.tolist()


def test_ranks_are_one_product_each():
    compiled = program(transformer(4, **LONG, **CASES["three choices, one place"]), EVEN, frames=2)
    routed = [w.instruction for w in works(compiled, compiled.steps[0])
              if w.instruction.opcode is Opcode.LINEAR and w.instruction.target == Target.ROUTER]
    firsts = [i for i in routed if not i.same_frame]
    assert [i.choice for i in firsts] == [1, 1] and [i.append for i in firsts] == [0, 1]
    assert [i.append for i in routed] == [0] + [1] * (len(routed) - 1)
    turns = [i.choice for i in routed]
    half = len(turns) // 2
    assert turns == 2 * sorted(turns[:half]) and set(turns) == {1, 2, 3}


@pytest.mark.parametrize("plan", PLANS[1:], ids=["lean", "halves", "quarters", "spill"])
@pytest.mark.parametrize("by_rank", [False, True])
def test_every_plan_gives_the_same(plan, by_rank):
    check(transformer(3, **SIZES["odd"], capacity=2, by_rank=by_rank), EVEN, 3, plans=[plan], frames=2)


def test_blocks_of_rows_that_pass_on_chip_count_on():
    tight = dataclasses.replace(EVEN, activation_words=30, residual_words=200, weight_words=24,
                                param_words=24)
    check(transformer(5, **SIZES["wide"], capacity=4), tight, 2, plans=PLANS[-1:])
    with pytest.raises(CompileError, match="must lie on chip together"):
        program(transformer(5, **SIZES["wide"], capacity=4, by_rank=True), tight, plans=PLANS[-1:])


def test_a_capacity_without_gateware_is_refused():
    with pytest.raises(CompileError, match="more than Config.router_forms = 0"):
        program(transformer(3, **SIZES["odd"], capacity=2), configs.CONFIGS[0])
