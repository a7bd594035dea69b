"""What an adapter's switch costs is measured beside a token without one."""

from grpo.benchmark.adapters import switch_costs


def test_a_switch_takes_less_than_a_millisecond_beside_the_token_after_it() -> None:
    rows = {(row.side, row.unit): row for row in switch_costs("qwen3-1m", 4, 5)}
    assert set(rows) == {("same adapter", "ms"), ("after a switch", "ms"), ("after a switch", "ms switch")}
    assert min(rows["after a switch", "ms switch"].runs) < 1
    assert rows["after a switch", "ms"].ratio > 0.2
