"""A behaviour and a workload that kill the process they run in, for tests of who records on; other processes import them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mango_env.store import TrajectoryWriter
from tests.tiny_workload import Regression


class KilledOnce:
    """A behaviour that kills the first process that has added so many layers of a run."""

    name = "random"

    def __init__(self, marker: Path, after: int) -> None:
        self.marker, self.after = marker, after

    def reset(self) -> None:
        original, marker, after, added = TrajectoryWriter.add, self.marker, self.after, 0

        def add(writer: Any, episode: Any) -> None:
            nonlocal added
            if added == after and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            original(writer, episode)
            added += 1

        setattr(TrajectoryWriter, "add", add)  # noqa: B010 - in the process that is to be killed

    def act(self, obs: Tensor) -> None:
        return None


class FragileRegression(Regression):
    """Kills its process when it is evaluated, as often as `deaths` says; each death leaves a file in the folder."""

    folder: Path
    deaths: int

    def evaluate(self) -> dict[str, float]:
        died = len(list(self.folder.iterdir()))
        if died < self.deaths:
            (self.folder / str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate()


def fragile(folder: Path, deaths: int) -> Callable[[int], Regression]:
    folder.mkdir()

    def build(seed: int) -> Regression:
        made = FragileRegression(seed)
        made.folder, made.deaths = folder, deaths
        return made

    return build
