"""What stands in every file of results: who measured what, where, when and with which code. Nothing to run by itself."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train_policy.cli_support import plain, write_json
from train_policy.provenance import about


def stamp(args: Any = None) -> dict[str, Any]:
    """Command, arguments (a dataclass), commit, hardware and versions; beside those of every result, the load of the machine."""
    told = about(shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    hardware = told["hardware"] | {"load": load, "system": f"{platform.system()} {platform.machine()}"}
    return told | {"args": {} if args is None else plain(asdict(args)), "hardware": hardware}


def write(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> Path:
    """Write results as JSON, aside first; returns where they are."""
    target = Path(path)
    write_json(target, payload)
    return target
