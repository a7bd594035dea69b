"""Prompts that environments supply, or add to: rows without any, and a plan that has room for what is added."""

from __future__ import annotations

from pathlib import Path

from runs.conversing import conversing  # noqa: F401

ROWS = '{"question": "What is 1+1?"}\n{"question": "What is 2+2?"}\n'


def test_rows_without_prompts(conversing: Path, run_cli) -> None:  # noqa: F811
    """They are planned for at their longest, and each completion may have one of its own."""
    Path("train.jsonl").write_text(ROWS)
    conversing.write_text(conversing.read_text().replace(', prompt: "{question}"', ", max_prompt_length: 200"))
    ran = run_cli("train", conversing, "--dry-run")
    assert ran.code == 0, ran.err
    said = " ".join((ran.out + ran.err).split())
    assert f"8 completions, at most {8 * (200 + 64):,} tokens" in said
    assert "; planned for data.max_prompt_length (200 tokens), because an environment's reset may add to them" in said
