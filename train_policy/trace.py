"""What the steps of a training loop take: a JSON per N steps with times by phase and the memory report, and a Chrome trace.

    with Tracer(optimizer, Tracing(every=100), "runs/trace"):
        for batch in data:
            ...
            optimizer.step()

Any torch optimizer can be watched. What is kept is bounded: the oldest files go first, and each lists so many steps at most.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mango.optimizer import MANGO
from train_policy.cli_support import write_json
from train_policy.provenance import about
from train_policy.state_bytes import state_nbytes
from train_policy.throughput import peak_bytes

PHASES = ("forward_backward", "optimizer_step", "decision")
LONGEST = 256                                            # steps that a file lists one by one: its last ones
PROFILED = 3                                             # steps in a Chrome trace, after one that warms up


@dataclass(frozen=True, slots=True)
class Tracing:
    """What is written about a run's steps; nothing by default."""

    every: int | None = None                             # optimizer steps per JSON
    files: int = 20                                      # JSONs that are kept; older ones are deleted
    profile: str | None = None                           # folder of Chrome traces by torch.profiler

    def __post_init__(self) -> None:
        for name in ("every", "files"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"trace_{name}={value} must be at least 1")


UNTRACED = Tracing()


class Tracer:
    """Times the phases of every step while its block runs: gradients (from the last step's end), the step, the decision in it.

    `folder` gets `step-00000100.json` and so on (what an earlier run left of these is deleted), `tracing.profile` a Chrome
    trace called as the folder is. On a GPU each phase waits for the device, so a traced run is slower.
    """

    def __init__(self, optimizer: Optimizer, tracing: Tracing, folder: str | Path) -> None:
        self.optimizer, self.tracing, self.folder = optimizer, tracing, Path(folder)
        self.device = next(p.device for group in optimizer.param_groups for p in group["params"])
        self.step = 0
        self._seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._written: list[Path] = []
        self._about: dict[str, Any] = {}
        self._outside = 0.0                              # seconds of decisions outside the optimizer's step
        self._profiler: Any = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Tracer":
        if self.tracing.every is not None:
            self._about = about()
            for old in self.folder.glob("step-*.json"):
                old.unlink()
        if self.tracing != UNTRACED:
            watched = self.optimizer
            self._hooks = [watched.register_step_pre_hook(self._before), watched.register_step_post_hook(self._after)]
        if self.tracing.profile is not None:
            self._profiler = self._new_profiler(Path(self.tracing.profile) / f"{self.folder.name}.json")
            self._profiler.start()
        self.mark()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._profiler is not None:
            self._profiler.stop()
            if self.step < 2 and kind is None:
                raise ValueError(f"a profile takes at least 2 optimizer steps, one to warm up; the run had {self.step}")

    def mark(self) -> None:
        """What was done since the last step (an evaluation, say) is no part of the next one."""
        self._last = self._now()

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """A decision outside the optimizer's step: it counts to the next step."""
        began = self._now()
        yield
        self._last = self._now()
        self._outside += self._last - began

    def _now(self) -> float:
        if self.device.type == "cuda" and self.tracing.every is not None:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _before(self, *_: Any) -> None:
        self._entered = self._now()
        self._decided = self.optimizer.seconds_deciding if isinstance(self.optimizer, MANGO) else 0.0

    def _after(self, *_: Any) -> None:
        now = self._now()
        inside = self.optimizer.seconds_deciding - self._decided if isinstance(self.optimizer, MANGO) else 0.0
        for phase, seconds in zip(
            PHASES, (self._entered - self._last, now - self._entered - inside, inside + self._outside), strict=True
        ):
            self._seconds[phase].append(seconds)
        self.step, self._outside = self.step + 1, 0.0
        if self.tracing.every is not None and self.step % self.tracing.every == 0:
            self._write()
        if self._profiler is not None:
            self._profiler.step()
        self.mark()

    def _write(self) -> None:
        memory = self.optimizer.memory_report() if isinstance(self.optimizer, MANGO) else {"total": state_nbytes(self.optimizer)}
        count = len(self._seconds[PHASES[0]])
        summary = {
            phase: {"total": sum(seconds), "mean": sum(seconds) / count, "max": max(seconds)}
            for phase, seconds in self._seconds.items()
        }
        path = self.folder / f"step-{self.step:08d}.json"
        write_json(path, {
            "kind": "trace", "about": self._about, "optimizer": type(self.optimizer).__name__,
            "first_step": self.step - count + 1, "last_step": self.step, "seconds": summary,
            "seconds_per_step": {phase: seconds[-LONGEST:] for phase, seconds in self._seconds.items()},
            "memory": memory, "peak_memory_bytes": peak_bytes(self.device),
        })  # fmt: skip
        self._seconds = {phase: [] for phase in PHASES}
        self._written.append(path)
        while len(self._written) > self.tracing.files:
            self._written.pop(0).unlink(missing_ok=True)

    def _new_profiler(self, path: Path) -> Any:
        from torch.profiler import ProfilerActivity, profile, schedule

        def export(profiler: Any) -> None:
            if self.step < 2:                            # it has warmed up alone
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))

        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        return profile(activities=kinds, schedule=schedule(wait=0, warmup=1, active=PROFILED, repeat=1), on_trace_ready=export)
