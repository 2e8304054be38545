"""Every component documents exactly the ports that it declares."""

import importlib
import pkgutil
import re

import pytest
from amaranth.lib import wiring

from moeware import hw


def components():
    for info in pkgutil.walk_packages(hw.__path__, "moeware.hw."):
        module = importlib.import_module(info.name)
        yield from (c for c in vars(module).values()
                    if isinstance(c, type) and c.__module__ == module.__name__
                    and issubclass(c, (wiring.Component, wiring.Signature)))


def documented(component):
    section = re.search(r"Members\n\s*-+\n(.*)", component.__doc__ or "", re.DOTALL)
    return set(re.findall(r"^    +(\w+) : ", section[1] if section else "", re.MULTILINE))


@pytest.mark.parametrize("component", list(components()), ids=lambda c: c.__qualname__)
def test_members_section_exists(component):
    assert documented(component)


@pytest.mark.parametrize(
    "component", [c for c in components() if issubclass(c, wiring.Component)],
    ids=lambda c: c.__qualname__)
def test_members_section_names_the_declared_ports(component):
    declared = {name for name, member in getattr(component, "__annotations__", {}).items()
                if isinstance(member, wiring.Member)}
    assert documented(component) >= declared
