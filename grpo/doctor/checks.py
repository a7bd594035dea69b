"""All checks in their order, and the printed report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace

from grpo import __version__
from grpo.backend.hub import one_line
from grpo.doctor.agreement import parity
from grpo.doctor.finding import Finding, without_secrets
from grpo.doctor.machine import blas, compiler, device, sandbox, wired_limit
from grpo.doctor.packages import INSTALL, backends, versions
from grpo.doctor.places import grpo_cache, hub_cache, recipes, runs_folder
from grpo.doctor.services import hub, hub_token, wandb
from grpo.errors import UserError

Check = Callable[[], Finding]

CHECKS: tuple[Check, ...] = (
    *(versions, backends),
    *(device, wired_limit, blas, compiler, parity, sandbox),
    *(recipes, runs_folder, grpo_cache, hub_cache),
    *(hub, hub_token, wandb),
)
"""Each check is a function without required arguments. Its optional arguments replace what it queries, for tests.

The checks of MLX's installation come before the checks that use MLX.
"""


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """Yield the finding of each check. A check that raises counts as failed, with its exception."""
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            finding = check()
        except ModuleNotFoundError as error:
            finding = Finding(name, "fail", f"a Python package is missing: {one_line(error)}", INSTALL)
        except UserError as error:  # a version that lacks what grpo needs (`grpo.model.mlxlm`)
            finding = Finding(name, "fail", one_line(error), INSTALL)
        except Exception as error:
            text = f"the check itself failed: {type(error).__name__}: {one_line(error)}"
            finding = Finding(name, "fail", text, "report it with the output of `grpo doctor --json`")
        yield replace(finding, text=without_secrets(finding.text), remedy=without_secrets(finding.remedy))


def report(checks: Iterable[Check], as_json: bool) -> int:
    """Print a line for each check as it is done, or all of them as one JSON object. Returns the exit code."""
    out, findings = sys.stdout, []
    with redirect_stdout(sys.stderr):  # keep the output of libraries out of the report
        for finding in examine(checks):
            findings.append(finding)
            if not as_json:
                print(finding.line(), file=out, flush=True)
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        document = {"grpo": __version__, "ok": not failed, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document, indent=2, ensure_ascii=False))
    return int(failed)
