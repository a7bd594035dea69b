"""Checks of the installed versions, and known problems of versions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from grpo.backend import blas
from grpo.backend.imports import install
from grpo.backend.versions import numbers, requirements, untested
from grpo.backend.versions import versions as installed_versions
from grpo.doctor.finding import Finding

Installed = Callable[[], Mapping[str, str]]
"""Returns versions by the names of distributions."""


@dataclass(frozen=True, slots=True)
class KnownBad:
    """A package that does not work before the version `below`, and why."""

    package: str
    below: str
    why: str


KNOWN_BAD = (
    KnownBad("mlx", "0.32.2", "mx.fast.rope is wrong for batched decoding in older versions"),
    KnownBad("mlx-lm", "0.32", "grpo reads models and writes adapters in the format of newer versions"),
)
"""The list of versions that do not work. pyproject.toml keeps pip from most of them; upper bounds are only there."""

INSTALL = "pip install grpo-mlx (even if it is installed: pip adds the missing requirements)"

BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal")
"""Distributions that contain MLX's library. They write the same files, so the last one installed wins."""


def absent() -> list[str]:
    """Return the required packages that are not installed. Empty if grpo itself is not installed as a package."""
    return [name for name in requirements() if not blas.installed(name)]


def versions(
    installed: Installed = installed_versions,
    absent: Callable[[], Collection[str]] = absent,
    required: Installed = requirements,
) -> Finding:
    """Check Python, the packages that determine numerical results, and whether all required packages are installed.

    A package that is newer than the versions that grpo was tested with is a warning, because it may work.
    """
    found = installed()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    needed = [bad.package for bad in KNOWN_BAD if bad.package not in found]
    if missing := list(dict.fromkeys([*needed, *absent()])):
        return Finding("versions", "fail", f"not installed: {', '.join(missing)} ({text})", INSTALL)
    wrong = [bad for bad in KNOWN_BAD if numbers(found[bad.package]) < numbers(bad.below)]
    if wrong:
        said = "; ".join(f"{bad.package} {found[bad.package]}: {bad.why}" for bad in wrong)
        wanted = " ".join(f"'{bad.package}>={bad.below}'" for bad in wrong)
        return Finding("versions", "fail", f"{said} ({text})", f"pip install --upgrade {wanted}")
    if newer := untested(found, wanted_of := required()):
        said = "; ".join(f"{name} {found[name]}: grpo was tested below {limit}" for name, limit in newer.items())
        tested = " ".join(f"'{name}{wanted_of[name]}'" for name in newer)
        remedy = f"if something goes wrong: pip install --upgrade grpo-mlx, or pip install {tested}"
        return Finding("versions", "warn", f"{said} ({text})", remedy)
    return Finding("versions", "ok", text)


def backends(installed: Installed = installed_versions) -> Finding:
    """Check whether exactly one package contains MLX's library, in the version of MLX."""
    found = installed()
    there = {name: found[name] for name in BACKENDS if name in found}
    said = " and ".join(f"{name} {version}" for name, version in there.items())
    again = f"pip uninstall -y {' '.join(['mlx', *there])}, then install grpo-mlx with one of [cpu], [cuda12], [cuda13]"
    if len(there) > 1:
        return Finding("backends", "fail", f"{said} are installed over each other: they write the same files", again)
    if not there:
        text = "no package contains MLX's library: correct only if MLX was built from source"
        return Finding("backends", "warn", text, f"{install('cpu')}, or [cuda12], [cuda13]")
    if set(there.values()) != {found.get("mlx")}:
        return Finding("backends", "fail", f"{said} does not match the version of mlx, {found.get('mlx')}", again)
    return Finding("backends", "ok", said)
