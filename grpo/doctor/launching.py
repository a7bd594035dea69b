"""`grpo doctor --ranks`: starts the processes of a hostfile, and in each process measures the links."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from grpo.backend.ranks import Ranks
from grpo.doctor.checks import examine, report
from grpo.doctor.hostfile import hostfile as check_hostfile
from grpo.doctor.ranks import checks_of
from grpo.errors import UserError

COMMAND = 'mlx.launch -n 2 -- "$(which grpo)" doctor --ranks'


def report_ranks(hostfile: Path | None, as_json: bool) -> int:
    """Print the findings about a hostfile and about the links between processes. Returns the exit code.

    Raises UserError if there is no hostfile and this process was not started by a launcher.
    """
    if hostfile is not None:
        failed = report([lambda: check_hostfile(hostfile)], as_json)
        return failed or _launched(hostfile, as_json)
    ranks = Ranks.launched()
    if ranks.size == 1:
        raise UserError(
            f"--ranks measures the links between several processes, but this is a single process: use {COMMAND}, or "
            "--hostfile"
        )
    checks, code = checks_of(ranks), 0
    if ranks.first:
        code = report(checks, as_json)
    else:
        list(examine(checks))
    ranks.finish()
    return code


def _launched(hostfile: Path, as_json: bool) -> int:
    """Start the processes of a hostfile to measure their links. Returns the launcher's exit code."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    grpo = Path(sys.executable).with_name("grpo")
    options = ["--json"] if as_json else []
    command = [str(launcher), "--hostfile", str(hostfile), "--", str(grpo), "doctor", "--ranks", *options]
    return subprocess.run(command, check=False).returncode
