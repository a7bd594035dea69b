"""Runs a notebook's code cells in this process, as a kernel does, and keeps what each put out.

`python notebooks.py IN.ipynb OUT.ipynb [NAME=VALUE ...]` writes the notebook with what its cells put out; `NAME=VALUE`
replaces a line `NAME = ...` of a cell. It ends at the first cell that raises. It needs the standard library, grpo and
matplotlib. `docs/quickstart.ipynb` was written so.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any


def executed(notebook: dict[str, Any], replaced: dict[str, str]) -> dict[str, Any]:
    """The notebook with the outputs of its cells, as notebooks store them."""
    import matplotlib

    matplotlib.use("Agg")
    space: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        code = "".join(cell["source"])
        for name, value in replaced.items():
            code = re.sub(rf"^{name} = \S+", f"{name} = {value}", code, flags=re.MULTILINE)
        cell |= {"outputs": _outputs(code, space), "execution_count": number}
    return notebook


def _outputs(cell: str, space: dict[str, Any]) -> list[dict[str, Any]]:
    from matplotlib import pyplot

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.parse(cell), "<cell>", "exec"), space)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
        )
    for number in pyplot.get_fignums():
        image = io.BytesIO()
        figure = pyplot.figure(number)
        figure.savefig(image, format="png", bbox_inches="tight", metadata={"Software": None})
        size = "<Figure size {:.0f}x{:.0f} with 1 Axes>".format(*(figure.get_size_inches() * figure.dpi))
        data = {"image/png": base64.b64encode(image.getvalue()).decode(), "text/plain": [size]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
        pyplot.close(figure)
    return outputs


if __name__ == "__main__":
    source, target, *settings = sys.argv[1:]
    read = json.loads(Path(source).read_text(encoding="utf-8"))
    made = executed(read, dict(pair.split("=", 1) for pair in settings))
    Path(target).write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
