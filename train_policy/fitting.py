"""What every training stage shares: a checkpoint that survives Ctrl-C, a progress line, and the error that says so."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mango.networks import PolicyNetwork
from mango.policy_file import freeze


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the best weights so far were saved. Commands exit with code 130."""

    def __init__(self, stage: str, checkpoint: Path | None, done: str) -> None:
        kept = f"the best weights so far are in {checkpoint}" if checkpoint is not None else "no checkpoint path was given"
        super().__init__(f"{stage} interrupted after {done}; {kept}")
        self.checkpoint = checkpoint


class Advance(Protocol):
    def __call__(self, steps: float = 1, *, status: str = "") -> None: ...


@contextmanager
def progress_line(description: str, total: float, enabled: bool) -> Iterator[Advance]:
    """A progress bar with time left, on stderr; yields `advance(steps, status=...)`. Disabled it prints nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bars:
        task = bars.add_task(description, total=total, status="")

        def advance(steps: float = 1, *, status: str = "") -> None:
            bars.update(task, advance=steps)
            if status:
                bars.update(task, status=status)

        yield advance


def save_checkpoint(network: PolicyNetwork, path: Path | None, *, head: str, card: Mapping[str, Any]) -> None:
    """Write the network as a policy file (see `mango.policy_file`), so that a checkpoint already is a usable policy."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        freeze(network, path, head=head, card=dict(card))
