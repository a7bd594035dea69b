"""Leaves cases that repeat what others show to the slow tests."""

from __future__ import annotations

from collections import defaultdict

import pytest


def thin(items: list[pytest.Item]) -> None:
    """Mark cases `slow`, as their tests' marks say.

    `each_value`: the cases that add no value of any parameter. They are chosen greedily, in their order: each value of
    each parameter stays in at least one case that is not slow. `quick_cases(*ids)`: the cases whose id has none of
    these as a part.
    """
    tests: defaultdict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        if item.get_closest_marker("each_value"):
            tests[item.nodeid.partition("[")[0]].append(item)
        quick = item.get_closest_marker("quick_cases")
        if quick and not any(f"-{part}-" in f"-{item.callspec.id}-" for part in quick.args):
            item.add_marker("slow")
    for cases in tests.values():
        _one_of_each_value(cases)


def _one_of_each_value(cases: list[pytest.Function]) -> None:
    values = {case: {(name, repr(value)) for name, value in case.callspec.params.items()} for case in cases}
    quick = [case for case in cases if not case.get_closest_marker("slow")]
    left = set().union(*(values[case] for case in quick))
    while left:
        best = max(quick, key=lambda case: len(values[case] & left))
        left -= values[best]
        quick.remove(best)
    for case in quick:
        case.add_marker("slow")
