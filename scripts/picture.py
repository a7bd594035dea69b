"""Makes the pictures of the README and the manual from a run of the quickstart: its terminal and its learning curve.

python scripts/picture.py [FOLDER]    trains the quickstart in FOLDER (default: a temporary folder)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "pages" / "images"
STEPS = {"1/60", "2/60", "10/60", "20/60", "40/60", "50/60", "60/60"}
SKIPPED = "memory", "updates of", "drafts", "prompts:", "decoding:", "speculation:", "decoded "
WIDTH = 108
"""Width of the terminal's picture in characters."""
FRAME = """\
<svg viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: {char_height}px;
  line-height: {line_height}px;
}}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect width="{terminal_width}" height="{terminal_height}" rx="8" fill="#1f2430"/>
<g transform="translate(9, 9)" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""
"""A terminal without a window frame. It loads no fonts from other sites."""


def trained(folder: Path) -> list[str]:
    """The lines that `grpo train quickstart` printed."""
    code = "import sys; from grpo.cli import main; sys.argv = ['grpo', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", code, "train", "quickstart", "--overwrite"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    (folder / "terminal.txt").write_text(ran.stdout, encoding="utf-8")
    return ran.stdout.splitlines()


def shown(lines: list[str]) -> list[str]:
    """The lines of the picture: the head, some steps, all evaluations, the table. `...` replaces the other lines."""
    kept = ["$ grpo train quickstart"]
    for line in lines:
        skipped = line.startswith(SKIPPED) or (line.startswith("step ") and line.split(" ", 2)[1] not in STEPS)
        line = "..." if skipped else line
        if line != "..." or kept[-1] != "...":
            kept.append(line[:WIDTH])
    return [*kept, ""]


def draw_terminal(lines: list[str], file: Path) -> None:
    from rich.console import Console
    from rich.text import Text

    with open(file.with_suffix(".txt"), "w", encoding="utf-8") as away:
        console = Console(record=True, width=WIDTH, file=away, force_terminal=True, color_system="truecolor")
        for line in lines:
            text = Text(line)
            text.highlight_regex(r"reward \d\S*|greedy [\d.]+%", "bold green")
            text.highlight_regex(r"^\.\.\.$", "bright_black")
            text.highlight_regex(r"^\$ .*", "bold cyan")
            console.print(text)
        console.save_svg(str(file), code_format=FRAME, unique_id="run")
    file.with_suffix(".txt").unlink()


def draw_curve(run: Path, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "grpo"
    from matplotlib import pyplot

    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(
        [s["step"] for s in steps], [s["reward"] for s in steps], color="#4477aa", label="reward, training prompts"
    )
    for name, color in (("greedy", "#228833"), ("avg@8", "#cc6677")):
        points = [e[name] for e in evals]
        low, high = zip(*(e[f"{name}_interval"] for e in evals), strict=True)
        below = [[p - a for p, a in zip(points, low, strict=True)], [b - p for p, b in zip(points, high, strict=True)]]
        at = [e["step"] for e in evals]
        axes.errorbar(at, points, below, marker="o", color=color, capsize=3, label=f"{name}, held-out prompts")
    axes.set(xlabel="step", ylabel="fraction right", ylim=(0, 1.02), xlim=(-1, steps[-1]["step"] + 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        lines = trained(folder)
        draw_terminal(shown(lines), IMAGES / "terminal.svg")
        draw_curve(folder / "runs" / "quickstart", IMAGES / "curve.svg")


if __name__ == "__main__":
    main()
