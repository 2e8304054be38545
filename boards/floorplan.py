"""Sites of multipliers and block RAMs, chosen before anything is placed.

A placer that spreads all cells at once and then takes these one by one to their sites throws the last
of them across the device, where it is nearly full of them: more than half of all wire was lost in that
step. Here they get their sites first. With every other cell where it pulls least, the squared lengths
of all wires are a quadratic form in the sites alone: quadratic placement (Kleinhans et al., "GORDIAN",
IEEE TCAD 10(3), 1991, section III) with the movable cells eliminated. Exchanging sites then lessens it
by simulated annealing (Kirkpatrick et al., Science 220, 1983). What stays as it was: the pins, to which
few wires go, and the density of the logic, which is the placer's.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import splu

__all__ = ["SITES", "energy_form", "exchange", "floorplan"]

Site = tuple[int, int, str]  # column, row, name of the bel

CLOCKS = ("CLK", "WCK")  # how their pins begin; they have wires of their own
MOST_PINS = 48  # of a net: wires of wider ones have a length that no site changes much
ORIGIN = 1e-4  # spring to the origin, of what no wire holds and would be anywhere
TURNS = 300  # of the annealing, for each site


def _ecp5_85() -> dict[str, list[Site]]:
    columns = [*range(4, 59, 9), *range(69, 115, 9)]
    return {
        "MULT18X18D": [(x + at, y, f"X{x + at}/Y{y}/MULT18_{at}")
                       for y in (10, 34, 58) for x in columns for at in (0, 1, 4, 5)],
        "DP16KD": [(x + 2 * at, y, f"X{x + 2 * at}/Y{y}/EBR{at}")
                   for y in (22, 46, 70, 82) for x in columns for at in range(4)],
    }


# By device, as Amaranth's platforms call it, then by type of cell.
SITES = {"LFE5U-85F": _ecp5_85(), "LFE5UM-85F": _ecp5_85(), "LFE5UM5G-85F": _ecp5_85()}


def floorplan(netlist: dict, device: str, *, seed: int = 0) -> int:
    """Give the multipliers and block RAMs of a netlist their sites, by the attribute BEL.

    Parameters
    ----------
    netlist : as yosys writes it in JSON, flat; changed in place.
    device : without an entry in `SITES` nothing is done, nor where the sites do not suffice: placement
        then says what is missing.
    seed : of the annealing; the same seed gives the same sites.

    Returns
    -------
    The number of cells that got a site.
    """
    sites = SITES.get(device, {})
    module, = (module for module in netlist["modules"].values()
               if int(module["attributes"].get("top", "0"), 2))
    cells = {name: cell for name, cell in module["cells"].items()
             if not cell["type"].startswith("$")}
    groups = {kind: [name for name, cell in cells.items() if cell["type"] == kind]
              for kind in sites}
    if not any(groups.values()) or any(len(groups[kind]) > len(sites[kind]) for kind in sites):
        return 0
    fixed = [name for names in groups.values() for name in names]
    free = [name for name in cells if cells[name]["type"] not in sites]
    form = energy_form(_nets(cells, {name: i for i, name in enumerate([*fixed, *free])}),
                       len(fixed), len(cells))
    chosen = exchange(form, [(len(groups[kind]), sites[kind]) for kind in sites], seed=seed)
    for name, (_, _, bel) in zip(fixed, chosen, strict=True):
        cells[name]["attributes"]["BEL"] = bel
    return len(fixed)


def _nets(cells: Mapping[str, dict], number: Mapping[str, int]) -> list[list[int]]:
    """The cells of each net, by their numbers."""
    nets = defaultdict(set)
    for name, cell in cells.items():
        for pin, bits in cell["connections"].items():
            if not pin.startswith(CLOCKS):
                for bit in bits:
                    if isinstance(bit, int):  # else a constant
                        nets[bit].add(number[name])
    return [sorted(net) for net in nets.values()]


def energy_form(nets: list[list[int]], fixed: int, cells: int) -> np.ndarray:
    """The matrix S of the least energy ``x @ S @ x + y @ S @ y`` of the wires, where x and y are the
    places of the first `fixed` of `cells` cells and all others are where that is least.

    A net is a star: a point of its own with a spring of strength 1 / (k - 1) to each of its k cells. A
    weak spring draws every cell and point to the origin.
    """
    ends, strengths, nodes = [], [], cells
    for net in nets:
        if 2 <= len(net) <= MOST_PINS:
            ends += [(cell, nodes) for cell in net]
            strengths += [1 / (len(net) - 1)] * len(net)
            nodes += 1
    near, far = np.array(ends, np.int64).reshape(-1, 2).T
    pulls = coo_matrix((np.tile(strengths, 2), (np.r_[near, far], np.r_[far, near])),
                       shape=(nodes, nodes)).tocsr()
    laplacian = (diags(np.asarray(pulls.sum(axis=1)).ravel() + ORIGIN) - pulls).tocsc()
    inner, between = laplacian[fixed:, fixed:], laplacian[fixed:, :fixed].toarray()
    form = laplacian[:fixed, :fixed].toarray()
    if inner.shape[0]:
        # Symmetric and diagonally dominant: no pivoting, and an ordering for symmetric matrices.
        factors = splu(inner, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0,
                       options={"SymmetricMode": True})
        form -= between.T @ factors.solve(between)
    return (form + form.T) / 2


def exchange(form: np.ndarray, groups: list[tuple[int, list[Site]]], *, seed: int = 0) -> list[Site]:
    """A site for each cell that `form` speaks of, so that its energy is small.

    groups : cells of a kind, in the order of `form`, and the sites that they can have, at least as
    many. Every exchange with a site of the same kind is weighed at once, free sites among them.
    """
    draw = np.random.default_rng(seed)
    total, count = sum(len(sites) for _, sites in groups), len(form)
    # Cells, then a cell without wires for each site that stays free.
    springs = np.zeros((total, total))
    springs[:count, :count] = form
    places, taken = np.zeros((total, 2)), [None] * total
    alike = [None] * total  # the cells that each may change places with
    first, spare = 0, count
    for cells, sites in groups:
        kind = np.r_[first:first + cells, spare:spare + len(sites) - cells]
        first, spare = first + cells, spare + len(sites) - cells
        for cell, site in zip(kind, draw.permutation(len(sites))):
            places[cell], taken[cell], alike[cell] = sites[site][:2], sites[site], kind
    places -= places.mean(axis=0)  # the origin is the middle of all sites
    forces, own = springs @ places, springs.diagonal()

    def gains(cell):
        """What the energy grows by if the cell changes places with each of its kind."""
        kind = alike[cell]
        way = places[kind] - places[cell]
        return (2 * (way * (forces[cell] - forces[kind])).sum(axis=1)
                + (way ** 2).sum(axis=1) * (own[cell] + own[kind] - 2 * springs[cell, kind]))

    def swap(a, b):
        nonlocal forces
        forces += np.outer(springs[:, a] - springs[:, b], places[b] - places[a])
        places[[a, b]] = places[[b, a]]
        taken[a], taken[b] = taken[b], taken[a]

    heat = np.mean([np.abs(gains(cell)).mean() for cell in range(total)]) / 2
    for turn in range(turns := TURNS * total):
        cell = int(draw.integers(total))
        change = gains(cell)
        warmth = heat * (1 - turn / turns) ** 3
        odds = np.exp(-np.minimum((change - change.min()) / max(warmth, 1e-12), 60))
        odds = np.cumsum(odds)
        other = int(alike[cell][np.searchsorted(odds, odds[-1] * draw.random())])
        if other != cell:
            swap(cell, other)
        if turn % 10_000 == 0:
            forces = springs @ places  # without what rounding left
    while True:  # down to where no exchange helps
        swapped = False
        for cell in range(total):
            change = gains(cell)
            best = int(change.argmin())
            if change[best] < -1e-6 * (1 + heat):
                swap(cell, int(alike[cell][best]))
                swapped = True
        if not swapped:
            return taken[:count]
