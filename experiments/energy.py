"""Power while something runs: sampled from NVIDIA's driver, or said to be unavailable. Nothing to run by itself."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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

    def per_step(self, steps: int) -> float | str:
        """Joules per optimizer step, or "unavailable" with the reason."""
        joules = self.joules
        return f"{UNAVAILABLE}: {self.problem or 'too short to sample'}" if joules is None else joules / steps


@contextmanager
def metered(interval: float = 0.1) -> Iterator[Energy]:
    """Samples the power of all NVIDIA devices every `interval` seconds while the block runs.

    What other processes draw on the same devices is in it: NVML tells a board's power, not a process's.
    """
    energy, stop = Energy(), threading.Event()
    if shutil.which(QUERY[0]) is None:
        energy.problem = "there is no nvidia-smi on this machine"
        yield energy
        return
    began = time.perf_counter()

    def sample() -> None:
        while energy.problem is None:
            try:
                told = subprocess.run(QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
                watts = sum(float(line) for line in told.split())
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                energy.problem = " ".join(str(error).split())
                return
            energy.samples.append((time.perf_counter() - began, watts))
            if stop.wait(interval):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield energy
    finally:
        stop.set()
        thread.join(timeout=15)
