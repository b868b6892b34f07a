"""How fast a run trains and what it takes: seconds of training alone, samples and tokens per second, peak memory."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Watch:
    """Sums the seconds of its blocks; on a GPU a block ends when its work is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds += time.perf_counter() - began


def rates(workload: Any, steps: int, seconds: float) -> dict[str, float | None]:
    """Per second of training: steps, and samples and tokens where a workload says how many it takes per step."""
    found: dict[str, float | None] = {"train_seconds": seconds, "steps_per_second": steps / seconds if seconds else None}
    for what in ("samples", "tokens"):
        each = getattr(workload, f"{what}_per_step", None)
        found[f"{what}_per_second"] = None if each is None or not seconds else each * steps / seconds
    return found


def start_peak(device: torch.device) -> None:
    """Count the peak of `peak_bytes` from here on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        try:
            CLEAR.write_text("5")                        # Linux: the peak of resident memory begins anew
        except OSError:                                  # where that is forbidden the peak is of the whole process
            return


def peak_bytes(device: torch.device) -> int:
    """Most bytes allocated on a GPU, elsewhere resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_device(name: str, memory_fraction: float | None) -> torch.device:
    """The device of that name, limited to a share of its memory; `ValueError` where it or the share is not to be had."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if memory_fraction is None:
        return device
    if not 0 < memory_fraction <= 1:
        raise ValueError(f"--gpu-memory-fraction {memory_fraction} must be in (0, 1]")
    if device.type != "cuda":
        raise ValueError("--gpu-memory-fraction limits a GPU and the run is on the CPU; leave it out, or add --device cuda")
    torch.cuda.set_per_process_memory_fraction(memory_fraction, device)
    return device
