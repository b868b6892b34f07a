"""Power while something runs: sampled from NVIDIA's driver, or said to be unavailable.

    with metered() as energy:
        train()
    print(energy.joules, energy.write_csv("power.csv"))
"""

import csv
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

QUERY = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits")
UNAVAILABLE = "unavailable"


@dataclass
class Energy:
    """Watts as sampled (seconds since the start, sum over the devices), and the Joules of their trapezoids."""

    samples: list[tuple[float, float]] = field(default_factory=list)
    problem: str | None = None                           # why there are no samples

    @property
    def joules(self) -> float | None:
        """None where fewer than two samples could be taken."""
        if len(self.samples) < 2:
            return None
        pairs = zip(self.samples, self.samples[1:], strict=False)
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)

    def smoothed(self, seconds: float = 1.0) -> list[float]:
        """The watts' exponentially weighted moving average with this time constant; samples need not be evenly spaced."""
        if not seconds > 0:
            raise ValueError(f"seconds={seconds} must be positive: the time in which a sample's weight falls to 1/e")
        found: list[float] = []
        for i, (when, watts) in enumerate(self.samples):
            kept = math.exp((self.samples[i - 1][0] - when) / seconds) if i else 0.0
            found.append(watts + kept * (found[-1] - watts) if i else watts)
        return found

    def write_csv(self, path: str | Path, seconds: float = 1.0) -> Path:
        """Seconds, watts, and their moving average, a line per sample; ValueError where there are no samples."""
        if not self.samples:
            raise ValueError(f"there is no power to write: {UNAVAILABLE}: {self.problem or 'too short to sample'}")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("seconds", "watts", "watts_ewma"))
            writer.writerows((*sample, mean) for sample, mean in zip(self.samples, self.smoothed(seconds), strict=True))
        return target

    def per_step(self, steps: int) -> float | str:
        """Joules per optimizer step, or "unavailable" with the reason."""
        joules = self.joules
        return f"{UNAVAILABLE}: {self.problem or 'too short to sample'}" if joules is None else joules / steps


def no_driver() -> str | None:
    """Why power cannot be asked for on this machine; None: it can be tried."""
    return None if shutil.which(QUERY[0]) else "there is no nvidia-smi on this machine"


def watts_now() -> float:
    """The power of all NVIDIA devices, as the driver tells it."""
    told = subprocess.run(QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
    return sum(float(line) for line in told.split())


@contextmanager
def metered(interval: float = 0.1) -> Iterator[Energy]:
    """Samples the power of all NVIDIA devices every `interval` seconds while the block runs.

    What other processes draw on the same devices is in it: NVML tells a board's power, not a process's.
    """
    energy, stop = Energy(problem=no_driver()), threading.Event()
    if energy.problem is not None:
        yield energy
        return
    began = time.perf_counter()

    def sample() -> None:
        try:
            energy.samples.append((time.perf_counter() - began, watts_now()))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            energy.problem = " ".join(str(error).split())

    def go_on() -> None:
        while energy.problem is None and not stop.wait(interval):
            sample()

    sample()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield energy
    finally:
        stop.set()
        thread.join(timeout=15)
        if energy.problem is None:
            sample()                                     # the block has a power at both of its ends, however short it is
