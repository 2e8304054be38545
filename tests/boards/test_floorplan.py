"""Sites for multipliers and block RAMs: legal, repeatable, and near what they are wired to."""

import numpy as np
import pytest

from moeware.boards.floorplan import ORIGIN, SITES, energy_form, exchange, floorplan

DEVICE = "LFE5U-85F"
KINDS = ("MULT18X18D", "DP16KD")


def chain(groups, members, *, wires=4):
    """A netlist of groups: in each, a ring of `members` multipliers and as many block RAMs in turn,
    with a few look-up tables on each wire; wide nets and clocks join all of them."""
    cells, bit = {}, 10
    clock, enable = 2, 3
    for group in range(groups):
        ring = [(f"g{group}.{KINDS[i % 2]}{i}", KINDS[i % 2]) for i in range(2 * members)]
        for name, kind in ring:
            cells[name] = {"type": kind, "attributes": {},
                           "connections": {"CLKA": [clock], "CEA": [enable], "A": [], "B": []}}
        for (a, _), (b, _) in zip(ring, [*ring[1:], ring[0]]):
            for wire in range(wires):
                cells[f"{a}-{b}.{wire}"] = {
                    "type": "LUT4", "attributes": {},
                    "connections": {"A": [bit], "B": ["0"], "Z": [bit + 1]}}
                cells[a]["connections"]["A"].append(bit)
                cells[b]["connections"]["B"].append(bit + 1)
                bit += 2
    return {"modules": {"top": {"attributes": {"top": "00000001"}, "cells": cells}}}


def bels(netlist):
    return {name: cell["attributes"]["BEL"]
            for name, cell in netlist["modules"]["top"]["cells"].items()
            if "BEL" in cell["attributes"]}


def test_every_site_is_one_of_the_device_and_taken_once():
    netlist = chain(6, 26)  # all multipliers of the device, most of its block RAMs
    assert floorplan(netlist, DEVICE) == 6 * 52
    found = bels(netlist)
    assert len(found) == len(set(found.values())) == 6 * 52
    for name, bel in found.items():
        kind = netlist["modules"]["top"]["cells"][name]["type"]
        assert bel in {site for _, _, site in SITES[DEVICE][kind]}


def test_the_sites_of_the_device_are_as_many_as_it_has():
    assert {kind: len(sites) for kind, sites in SITES[DEVICE].items()} == {
        "MULT18X18D": 156, "DP16KD": 208}


def test_what_is_wired_together_lies_together():
    netlist = chain(4, 20)
    floorplan(netlist, DEVICE)
    where = {bel: (x, y) for sites in SITES[DEVICE].values() for x, y, bel in sites}
    places = {name: np.array(where[bel]) for name, bel in bels(netlist).items()}

    def spread(names):
        points = np.array([places[name] for name in names])
        return np.square(points - points.mean(axis=0)).sum(axis=1).mean()

    groups = [[name for name in places if name.startswith(f"g{group}.")] for group in range(4)]
    draw = np.random.default_rng(3)
    mixed = [draw.choice(list(places), len(groups[0]), replace=False) for _ in range(4)]
    assert sum(map(spread, groups)) < 0.5 * sum(map(spread, mixed))


def test_the_same_seed_gives_the_same_sites():
    first, again, other = chain(3, 9), chain(3, 9), chain(3, 9)
    floorplan(first, DEVICE, seed=5)
    floorplan(again, DEVICE, seed=5)
    floorplan(other, DEVICE, seed=6)
    assert bels(first) == bels(again) != bels(other)


@pytest.mark.parametrize("netlist, device", [
    (chain(3, 9), "LFE5U-12F"), (chain(6, 27), DEVICE), (chain(0, 0), DEVICE)],
    ids=["unknown device", "too many multipliers", "nothing to place"])
def test_nothing_is_done_where_nothing_can_be(netlist, device):
    assert floorplan(netlist, device) == 0
    assert not bels(netlist)


def test_the_form_is_the_least_energy_over_all_other_cells():
    draw = np.random.default_rng(0)
    fixed, cells = 5, 30
    nets = [sorted({int(cell) for cell in draw.integers(cells, size=size)})
            for size in draw.integers(2, 6, size=60)]
    form = energy_form(nets, fixed, cells)
    places = draw.normal(size=fixed)

    # All springs as rows of a least-squares problem in the free cells and the middles of the nets.
    wired = [net for net in nets if len(net) >= 2]
    springs = [((len(net) - 1) ** -0.5, cell, cells + middle)
               for middle, net in enumerate(wired) for cell in net]
    springs += [(ORIGIN ** 0.5, point, None) for point in range(cells + len(wired))]
    rows = np.zeros((len(springs), cells + len(wired)))
    for number, (strength, near, far) in enumerate(springs):
        rows[number, near] = strength
        if far is not None:
            rows[number, far] = -strength
    sides = -rows[:, :fixed] @ places
    best = np.linalg.lstsq(rows[:, fixed:], sides, rcond=None)[0]
    least = np.square(rows[:, fixed:] @ best - sides).sum()
    assert places @ form @ places == pytest.approx(least, rel=1e-9)  # the rounding of two solvers


def test_no_exchange_of_two_sites_is_left_that_helps():
    draw = np.random.default_rng(1)
    half = draw.normal(size=(12, 12))
    form = half @ half.T
    sites = [(int(x), int(y), f"{x},{y}") for x in range(4) for y in range(4)]
    chosen = exchange(form, [(7, sites), (5, [(x + 10, y, f"b{name}") for x, y, name in sites])])
    assert all(name[0] == "b" for _, _, name in chosen[7:])
    middle = np.array([4 / 2 - 0.5 + 5, 1.5])

    def energy(places):
        points = np.array([site[:2] for site in places]) - middle
        return np.einsum("ik,ij,jk->", points, form, points)

    free = set(sites) - set(chosen)
    for a in range(7):
        for b in range(a):
            other = chosen.copy()
            other[a], other[b] = other[b], other[a]
            assert energy(other) >= energy(chosen) - 1e-6
        for site in free:
            assert energy([*chosen[:a], site, *chosen[a + 1:]]) >= energy(chosen) - 1e-6
