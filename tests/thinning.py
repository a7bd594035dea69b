"""Leaves cases that repeat what others show to the slow tests."""

from __future__ import annotations

from collections import defaultdict

import pytest


def thin(items: list[pytest.Item]) -> None:
    """Mark cases `slow`, as their tests' marks say.

    `each_value`: the cases that add no value of any parameter. They are chosen greedily, in their order: each value of
    each parameter stays in at least one case that is not slow. `quick_cases(*ids)`: the cases whose id has none of
    these as a part. Raises pytest.UsageError for an id that no case of a test has: without its cases, a test would
    silently be slow.
    """
    tests: defaultdict[str, list[pytest.Function]] = defaultdict(list)
    unmet: dict[str, set[str]] = {}
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        name = item.nodeid.partition("[")[0]
        if item.get_closest_marker("each_value"):
            tests[name].append(item)
        quick = item.get_closest_marker("quick_cases")
        if quick:
            met = {part for part in quick.args if f"-{part}-" in f"-{item.callspec.id}-"}
            unmet[name] = unmet.get(name, set(quick.args)) - met
            if not met:
                item.add_marker("slow")
    wrong = [f"{name}: quick_cases: no case has {part!r} in its id" for name in unmet for part in sorted(unmet[name])]
    if wrong and _are_all(items[0].config):
        raise pytest.UsageError("\n".join(wrong))
    for cases in tests.values():
        _one_of_each_value(cases)


def _are_all(config: pytest.Config) -> bool:
    """Whether all cases of a test are collected: none was named alone, or failed last."""
    return not (any("::" in argument for argument in config.args) or config.getoption("lf", False))


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
