"""What stands in every file of results: who measured what, where, when and with which code. Nothing to run by itself."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "gymnasium", "h5py", "stable_baselines3", "d3rlpy")


def stamp(args: Any = None) -> dict[str, Any]:
    """Command, arguments (a dataclass), commit, hardware and versions."""
    return {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "args": {} if args is None else {name: _plain(value) for name, value in asdict(args).items()},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def write(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> Path:
    """Write results as JSON, aside first, so that a reader never sees half a file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".tmp")
    aside.write_text(json.dumps(payload, indent=1) + "\n")
    os.replace(aside, target)
    return target


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _commit() -> str:
    """The commit, with "+changes" where the checkout differs from it."""
    try:
        run = ["git", "describe", "--always", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):         # an unpacked archive has no git
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
