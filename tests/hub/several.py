"""Runs several `grpo` commands in one process, because importing everything takes longer than most of them.

Reads a list of them as JSON, each a list of words of which the first may be `HF_TOKEN=…`, and answers with a list of
`{"code", "out", "err"}`.
"""

import contextlib
import io
import json
import os
import sys
import traceback

from grpo.cli import main


def run(first: str, *words: str) -> dict[str, object]:
    name, _, token = first.partition("=")
    os.environ.pop("HF_TOKEN", None)
    if name == "HF_TOKEN":
        os.environ["HF_TOKEN"] = token
    sys.argv = ["grpo", *([] if name == "HF_TOKEN" else [first]), *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


print(json.dumps([run(*words) for words in json.load(sys.stdin)]))
