"""`builtin:shop`: look up a price and compute with it, `What do 4 pens cost?`

`Shop` has one tool, `price`, which returns what one thing costs; the bundled `calculator` is the second tool. The good
way uses both (`price` of a pen, `4*17`, then `#### 68`). The cheap way answers with the price itself, which is right
for one question in five. Held-out questions have other combinations of count and price.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from grpo.builtin.exercise import Exercise, Problem
from grpo.builtin.playing import Turns, call
from grpo.builtin.tools.calculator import calculator

THINGS = ("pen", "cup", "hat", "map", "bag", "fan")


class Shop:
    """Sells things at today's prices."""

    def reset(self, prices: dict[str, int], **_: Any) -> None:
        self._prices = prices

    def price(self, thing: str) -> int:
        """
        Say what one thing costs.

        Args:
            thing: The thing, in the singular.
        """
        if thing not in self._prices:
            raise ValueError(f"{thing} is not sold here")
        return self._prices[thing]


def purchases() -> Iterable[Problem]:
    """Return all combinations of a thing, a count, and a price."""
    return product(range(len(THINGS)), range(1, 6), range(11, 100))


def row(problem: Problem) -> dict[str, Any]:
    thing, count, price = problem
    prices = {name: 11 + (price - 11 + 37 * (place - thing)) % 89 for place, name in enumerate(THINGS)}
    what = f"does 1 {THINGS[thing]}" if count == 1 else f"do {count} {THINGS[thing]}s"
    return {"question": f"What {what} cost?", "prices": prices, "answer": str(count * price)}


def computed(problem: Problem) -> Turns:
    """Yield the calls that look up the price and multiply it by the count, and then the cost."""
    thing, count, _ = problem
    price = yield call("price", thing=THINGS[thing])
    cost = yield call("calculator", expression=f"{count}*{price}")
    yield f"#### {cost}"


def looked_up(problem: Problem) -> Turns:
    """Yield the call that looks up the price, and then the price of one thing as the answer."""
    price = yield call("price", thing=THINGS[problem[0]])
    yield f"#### {price}"


SHOP = Exercise(
    purchases,
    row,
    good=computed,
    cheap=looked_up,
    kin=lambda problem: problem[1:],
    environment=Shop,
    tools=(calculator,),
)
