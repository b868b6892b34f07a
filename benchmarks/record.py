"""What stands in every file of results: who measured what, where, when and with which code. Nothing to run by itself."""

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import stdev
from typing import Any, TypeVar

import numpy as np

from train_policy.cli_support import one_line, plain, write_json
from train_policy.provenance import about

Args = TypeVar("Args")


def parse(kind: type[Args], about: str | None) -> Args:
    """The command line as a dataclass: an option per field, its default and its type; a bool is a switch."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(kind):  # type: ignore[arg-type]
        options: dict[str, Any] = {"type": type(field.default), "default": field.default, "help": f"default {field.default}"}
        if isinstance(field.default, bool):
            options = {"action": argparse.BooleanOptionalAction, "default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    return kind(**vars(parser.parse_args()))


def program(train: Callable[[Args], Path], kind: type[Args], about: str | None) -> None:
    """Parse the command line, run, print where the results are; a ValueError is one line and exit code 2."""
    try:
        print(train(parse(kind, about)))
    except ValueError as error:
        print(one_line(error), file=sys.stderr)
        raise SystemExit(2) from error


def stamp(args: Any = None) -> dict[str, Any]:
    """Command, arguments (a dataclass), commit, hardware and versions; beside those of every result, the load of the machine."""
    program = Path(sys.argv[0]).resolve()
    told = about(shlex.join(["python", "-m", f"{program.parent.name}.{program.stem}", *sys.argv[1:]]))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    hardware = told["hardware"] | {"load": load, "system": f"{platform.system()} {platform.machine()}"}
    return told | {"args": {} if args is None else plain(asdict(args)), "hardware": hardware}


def mean_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of `values`; None of fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def median_error(values: Sequence[float], resamples: int = 2000) -> float | None:
    """The standard error of the median of `values`, by the bootstrap from a fixed seed; None of fewer than two."""
    if len(values) < 2:
        return None
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return float(np.median(np.asarray(values, float)[picks], axis=1).std(ddof=1))


def earlier_runs(path: Path, kind: str = "runs") -> list[dict[str, Any]]:
    """The runs of a file of results, or other rows of it; none where there is no file."""
    runs: list[dict[str, Any]] = json.loads(path.read_text()).get(kind, []) if path.exists() else []
    return runs


def find_run(runs: Sequence[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first run with these facts, of which every run has all; None where it has not been done."""
    return next((run for run in runs if all(run[name] == value for name, value in facts.items())), None)


def write(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> Path:
    """Write results as JSON, aside first; returns where they are."""
    target = Path(path)
    write_json(target, payload)
    return target
