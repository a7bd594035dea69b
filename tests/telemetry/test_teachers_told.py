"""What a run with a teacher tells: plan, steps, report and card; a run without one says nothing of it."""

from __future__ import annotations

from pathlib import Path

from runs.test_taught_runs import with_adapter
from telemetry.pages import data_in, plots_in


def test_a_run_that_learns_from_a_teacher_alone(recipe: Path, run_cli) -> None:
    with_adapter(recipe)
    teacher = "teacher={adapter: teacher, kl: top_k, top_k: 5, coef: 0.5}"
    ran = run_cli("train", recipe, "rewards=[]", teacher, "output_dir=taught")
    assert ran.code == 0, ran.err
    flat = " ".join(ran.out.split())
    assert "rewards: none" in flat
    assert "top 5 KL × 0.5" in flat
    assert flat.count("teacher kl ") == 2
    assert "reward none" not in flat
    again = run_cli("replay", "taught", "--step", "2")
    assert again.code == 0, again.err
    assert "teacher/kl " in again.out
    assert run_cli("report", "taught", "--to", "taught.html").code == 0
    data = data_in(Path("taught.html").read_text())
    assert ("Policy", "KL to the teacher") in plots_in(data)
    settings = dict(data["runs"][0]["settings"])
    assert "top 5 KL × 0.5" in settings["loss"]
    assert settings["rewards"] == "none"
    assert run_cli("export", "taught", "--format", "mlx").code == 0
    (card,) = Path("taught").rglob("README.md")
    told = card.read_text()
    assert "Rewards: none. " in told.replace("\n", " ")
    assert "Its teacher was another adapter of that model: on-policy distillation (`teacher.kl: top_k`" in told


def test_a_run_without_a_teacher_says_nothing_of_it(recipe: Path, run_cli) -> None:
    ran = run_cli("train", recipe)
    assert "rewards: none" not in ran.out
    assert "teacher kl" not in ran.out
    assert run_cli("report", "runs/toy", "--to", "plain.html").code == 0
    assert ("Policy", "KL to the teacher") not in plots_in(data_in(Path("plain.html").read_text()))
