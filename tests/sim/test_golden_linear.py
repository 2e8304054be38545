"""LINEAR on the golden device, its router and its queues, against plain Python arithmetic."""

import dataclasses

import numpy as np
import pytest

from moeware.hw.arch.isa import Memory, Opcode, Target
from moeware.sim.golden import GoldenError

from .golden_machine import CONFIG, LINEAR, ROUTE, D, execute, exponential, scaled, wrapped


def products(machine, source_words, weight, channels, source_words_each):
    """Accumulators [row][channel]: the formula of the weight memory's layout, number by number."""
    rows = []
    for first in source_words:
        row = []
        for channel in range(channels):
            group, output = divmod(channel, CONFIG.outputs)
            total = 0
            for word in range(source_words_each):
                for lane in range(D):
                    total += int(machine.activation[first + word, lane]) * int(
                        machine.weight[weight + group * source_words_each + word, output, lane])
            row.append(wrapped(total + int(machine.param[3 + channel, 0]["bias"])))
        rows.append(row)
    return rows


def test_linear_to_activations(machine):
    value = products(machine, [10 + 3 * r for r in range(5)], 7, 7, 2)
    before = machine.activation.copy()
    assert execute(machine, (Opcode.LINEAR, LINEAR | {"target": Target.ACTIVATION})) == 2
    for row in range(5):
        for channel in range(7):
            word, lane = 60 + 2 * row + channel // D, channel % D
            assert machine.activation[word, lane] == scaled(value[row][channel],
                                                            machine.param[3 + channel, 0])
            before[word, lane] = machine.activation[word, lane]
    assert np.array_equal(machine.activation, before)  # the last lane of a row keeps its contents


def test_linear_through_a_table(machine):
    value = products(machine, [10 + 3 * r for r in range(5)], 7, 7, 2)
    execute(machine, (Opcode.LINEAR, LINEAR | {"tabled": 1, "table": 1}))
    for row in range(5):
        for channel in range(7):
            index = scaled(value[row][channel], machine.param[3 + channel, 0]) % 256
            assert (machine.activation[60 + 2 * row + channel // D, channel % D]
                    == machine.table[256 + index, 0])


@pytest.mark.parametrize("tabled", [0, 1])
def test_linear_to_products_of_pairs(machine, tabled):
    value = products(machine, [10 + 3 * r for r in range(5)], 7, 10, 2)
    before = machine.activation.copy()
    execute(machine, (Opcode.LINEAR, LINEAR | {"tabled": tabled, "table": 1, "channels": 10,
                                               "product": 1}))
    for row in range(5):
        for number in range(5):  # with one lane a word is a channel
            record = machine.param[3 + 2 * number, 0], machine.param[4 + 2 * number, 0]
            first = scaled(value[row][2 * number], record[0])
            first = int(machine.table[256 + first % 256, 0]) if tabled else first
            exact = (first * scaled(value[row][2 * number + 1], record[1], 16) + 512) // 1024
            place = 60 + 2 * row + number // D, number % D
            assert machine.activation[place] == max(-128, min(127, exact))
            before[place] = machine.activation[place]
    assert np.array_equal(machine.activation, before)


@pytest.mark.parametrize("accumulate", [0, 1])
def test_linear_to_the_residual_stream(machine, accumulate):
    machine.residual[60:70] = 32000  # some sums saturate
    before = machine.residual.copy()
    value = products(machine, [10 + 3 * r for r in range(5)], 7, 7, 2)
    execute(machine, (Opcode.LINEAR, LINEAR | {"target": Target.RESIDUAL, "accumulate": accumulate,
                                               "destination_stride": 8}))
    for row in range(5):
        for channel in range(7):
            word = 60 + 8 * row + channel
            update = scaled(value[row][channel], machine.param[3 + channel, 0], 16)
            total = update + accumulate * int(before[word, 0])
            assert machine.residual[word, 0] == max(-32768, min(32767, total))
            before[word] = machine.residual[word]
    assert np.array_equal(machine.residual, before)


def routed(logits, chosen, multiplier, shift, over_chosen):
    """Queues of (token, gate weight) by expert."""
    queues = [[] for _ in range(CONFIG.max_experts)]
    for token, row in enumerate(logits):
        order = sorted(range(len(row)), key=lambda e: (-row[e], e))[:chosen]
        weight = [exponential(max(row) - logit, multiplier, shift) for logit in row]
        total = sum(weight[e] for e in (order if over_chosen else range(len(row))))
        bits = total.bit_length()
        inverse = min((1 << (bits + 15)) // total, 65535)
        for expert in order:
            queues[expert].append((token, min(weight[expert] * inverse >> (bits - 1), 65535)))
    return queues




@pytest.mark.parametrize("over_chosen", [0, 1])
def test_router_fills_the_queues(machine, over_chosen):
    logits = products(machine, [10 + 3 * r for r in range(5)], 7, 4, 2)
    execute(machine, (Opcode.LINEAR, ROUTE | {"over_chosen": over_chosen}))
    assert machine.queues == routed(logits, 2, 50000, 20, over_chosen)
    assert sum(len(queue) for queue in machine.queues) == 10
    expected = [queue + [(token + 30, weight) for token, weight in queue]
                for queue in machine.queues]
    route = ROUTE | {"over_chosen": over_chosen}
    execute(machine, (Opcode.LINEAR, route),
            (Opcode.LINEAR, route | {"append": 1, "destination": 30}))
    assert machine.queues == expected


@pytest.mark.parametrize("form, message", [
    ({"sigmoid": 1, "group": 2}, "sigmoid, group must be 0 where Config.router_forms is 0, not 1, 2"),
    ({"by_score": 1}, "by_score must come with sigmoid"),
    ({"sigmoid": 1, "pair": 1}, "pair with by_score"),
    ({"group": 3, "chosen_groups": 1}, "must divide its 4 channels"),
    ({"group": 2, "chosen_groups": 3}, "3 chosen groups must be 1 to 2"),
    ({"group": 1, "chosen_groups": 1}, "hold the 2 chosen experts"),
    ({"group": 4, "chosen_groups": 2}, "and exist"),
    ({"sparse": 1, "over_chosen": 1}, "without over_chosen, sigmoid and group"),
    ({"sparse": 1, "over_chosen": 0, "sigmoid": 1}, "without over_chosen, sigmoid and group")])
def test_routers_without_gateware_are_refused(machine, form, message):
    if "is 0" not in message:
        machine.config = dataclasses.replace(CONFIG, router_forms=1, max_chosen=2)
    with pytest.raises(GoldenError, match=message):
        execute(machine, (Opcode.LINEAR, ROUTE | form))


def test_router_adds_corrections_of_its_parameters(machine):
    """All logits are equal: the corrections alone decide, and leave the weights alone."""
    machine.config = dataclasses.replace(CONFIG, router_forms=1)
    machine.weight[:], machine.param["bias"] = 0, 0
    machine.param["multiplier"], machine.param["shift"] = 9, 1
    machine.param["shift"][ROUTE["param"] + 2] = 3
    machine.param["multiplier"][ROUTE["param"] + 1] = 10
    execute(machine, (Opcode.LINEAR, ROUTE | {"sigmoid": 1, "by_score": 1}))
    half = [(token, 32767) for token in range(5)]  # less one unit
    assert machine.queues[:4] == [[], half, half, []]


def test_router_breaks_ties_by_the_lower_expert(machine):
    machine.weight[:] = 0
    machine.param["bias"] = 5
    execute(machine, (Opcode.LINEAR, ROUTE))
    assert [[token for token, _ in queue] for queue in machine.queues] == [
        [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [], []]


def test_experts_take_their_queue_and_gate_weights(machine):
    logits = products(machine, [10 + 3 * r for r in range(5)], 7, 4, 2)
    queues = routed(logits, 2, 50000, 20, 0)
    expert = max(range(4), key=lambda e: len(queues[e]))
    queue = queues[expert]
    assert 0 < len(queue) < 5  # so that gathering matters
    gathered = products(machine, [10 + 3 * token for token, _ in queue], 7, 5, 2)
    before = machine.residual.copy()
    execute(machine, (Opcode.LINEAR, ROUTE),
            (Opcode.LINEAR, LINEAR | {"queued": 1, "gather": 1, "scatter": 1, "gated": 1,
                                      "expert": expert, "accumulate": 1, "channels": 5, "rows": 9,
                                      "target": Target.RESIDUAL, "destination_stride": 6}))
    for (token, gate), row in zip(queue, gathered):
        for channel in range(5):
            update = scaled(row[channel], machine.param[3 + channel, 0], 16)
            update = (2 * update * gate + 65536) // 131072
            word = 60 + 6 * token + channel
            assert machine.residual[word, 0] == max(-32768, min(32767, int(before[word, 0]) + update))
            before[word] = machine.residual[word]
    assert np.array_equal(machine.residual, before)


def test_without_gather_and_scatter_rows_are_queue_positions(machine):
    logits = products(machine, [10 + 3 * r for r in range(5)], 7, 4, 2)
    queues = routed(logits, 2, 50000, 20, 0)
    expert = max(range(4), key=lambda e: len(queues[e]))
    count = len(queues[expert])
    value = products(machine, [10 + 3 * r for r in range(count)], 7, 3, 2)
    before = machine.activation.copy()
    execute(machine, (Opcode.LINEAR, ROUTE),
            (Opcode.LINEAR, LINEAR | {"queued": 1, "expert": expert, "channels": 3}))
    for row in range(count):
        for channel in range(3):
            assert machine.activation[60 + 2 * row, channel] == scaled(
                value[row][channel], machine.param[3 + channel, 0])
            before[60 + 2 * row, channel] = machine.activation[60 + 2 * row, channel]
    assert np.array_equal(machine.activation, before)


def test_conditional_instructions_follow_their_queue(machine):
    machine.weight[:] = 0
    machine.param["bias"][3:7, 0] = [9, 8, 1, 0]  # experts 0 and 1 take everything
    before = machine.activation.copy()
    load = {"memory": Memory.ACTIVATION, "words": 1, "address": 0, "conditional": 1}
    execute(machine, (Opcode.LINEAR, ROUTE), (Opcode.LOAD, load | {"local": 80, "expert": 1}),
            (Opcode.LOAD, load | {"local": 81, "expert": 2}))
    assert not machine.activation[80].any()
    assert np.array_equal(machine.activation[81], before[81])
