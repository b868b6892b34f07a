"""Collect trajectories: every workload under every behaviour, budget and seed, recorded as episodes.

A run is named by what it is made of, so a collection that was interrupted goes on where it stopped, and asking for more
seeds or behaviours later records only what is missing.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from mango_env.batched_run import batchable
from mango_env.interrupts import interrupted_once, interrupts_held
from mango_env.recorder import Recording, RunSummary, record_batch
from mango_env.run import TrainingRun, whole_number
from mango_env.store import TrajectoryWriter, finalize
from mango_env.workloads import workload_name
from mango_env.workloads.base import WorkloadBuilder
from train_policy.behaviours import behaviour_name, behaviour_of, behaviours
from train_policy.evaluate import Budget, EvaluationArgs, listed, start_run
from train_policy.fitting import progress_line
from train_policy.workers import begin_worker, worker_pool


@dataclass(frozen=True, slots=True)
class CollectArgs(EvaluationArgs):
    """What all runs of a collection share."""

    seed: int = 0                                        # of the behaviours; runs have seeds of their own


@dataclass(frozen=True, slots=True)
class CollectSummary:
    """What a collection did."""

    root: str
    recorded: int                                        # runs
    skipped: int                                         # runs that were there before
    diverged: int
    episodes: int                                        # recorded now
    decisions: int                                       # recorded now, summed over episodes
    seconds: float
    returns: dict[str, float]                            # mean return of the runs recorded now, by behaviour
    over_budget: int                                     # runs whose measured state exceeded the budget: must be 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Job:
    """One run to record."""

    run_id: str
    workload: str | WorkloadBuilder
    behaviour: str | Any
    seed: int
    budget: Budget
    args: CollectArgs
    missing: tuple[int, ...] | None = None               # layers to record; None: all


# Records jobs into the store at a root, for a task, by so many workers; each of them up to so many runs at once.
Recorder = Callable[[Sequence[Job], Path, str, int], Generator[RunSummary, None, None]]


def collect(
    workloads: str | WorkloadBuilder | Sequence[str | WorkloadBuilder],
    policies: str | Any | Sequence[str | Any],
    seeds: int | Sequence[int],
    budgets: Budget | Sequence[Budget],
    root: str | Path,
    args: CollectArgs | None = None,
    *,
    workers: int = 1,
    batch: int = 1,
    progress: bool = False,
) -> CollectSummary:
    """Record every combination into the store at `root` and return what was done.

    `policies`: see `behaviour_of`; "fixed" means every rung. `seeds`: a list, or how many. `workers` > 1 records in that
    many processes, each with shards of its own. `batch` > 1 trains up to so many runs side by side where their workload
    declares that it pays (`mango_env.batched_run`): numbers then agree to float32's rounding, not to the bit. Runs that
    the store already has are skipped; of a run that was cut short only the missing layers are added. After Ctrl-C every
    finished episode is in the store; runs side by side finish together.

    Raises ValueError before anything runs for unknown names and impossible budgets.
    """
    args = args or CollectArgs()
    works: list[str | WorkloadBuilder] = listed(workloads)
    sizes: list[Budget] = listed(budgets)
    draws = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    asked = [
        Job(run_id(work, spec, seed, size, args), work, spec, seed, size, args)
        for seed in draws
        for work in works
        for size in sizes
        for spec in behaviours(policies)
    ]
    if not asked:
        raise ValueError("collect needs at least one workload, policy, seed and budget")
    task = "+".join(workload_name(work) for work in works)
    return record_jobs(asked, root, task, workers=workers, batch=batch, progress=progress)


def record_jobs(
    asked: Sequence[Job], root: str | Path, task: str, *, workers: int = 1, batch: int = 1, progress: bool = False,
    run: Recorder | None = None, check: bool = True,
) -> CollectSummary:  # fmt: skip
    """Record those of the jobs that the store at `root` has not. `run`: by what; None is this process, or `workers` of them.

    `batch`: see `collect`. With `check`, ValueError before anything runs for unknown names, impossible budgets and jobs of
    different rewards.
    """
    if whole_number("batch", batch) > 1 and run is not None:
        raise ValueError(f"batch={batch} is for runs in this process and its workers; a recorder of your own takes batch=1")
    began = time.perf_counter()
    if check:
        _check(asked)
    _salvage(Path(root))
    jobs = list(remaining_jobs(asked, Path(root)))
    results: list[RunSummary] = []
    with progress_line("collecting", len(jobs), progress) as advance:
        run = run or partial(_record_here if workers <= 1 or len(jobs) < 2 else _record_in_processes, batch=batch)
        with closing(run(jobs, Path(root), task, workers)) as summaries:
            for summary in summaries:
                results.append(summary)
                advance(1, status=f"{summary.workload} {summary.policy} return {summary.returns:+.3f}")
    return _summary(Path(root), results, len(asked) - len(jobs), time.perf_counter() - began)


def run_id(work: str | WorkloadBuilder, spec: str | Any, seed: int, budget: Budget, args: CollectArgs) -> str:
    """The name of a run: readable, with a hash of everything that it depends on."""
    facts: list[Any] = [workload_name(work), behaviour_name(spec), seed, str(budget), args.horizon, args.interval, args.lr]
    facts += [args.rule, args.seed, args.reward.to_json()] + [args.schedule] * (args.schedule != "constant")
    facts += [["max_grad_norm", args.max_grad_norm]] * (args.max_grad_norm is not None)
    facts += [args.matrix_lr_scale] * (args.matrix_lr_scale != 1)
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    return f"{facts[0]}-{facts[1]}-s{seed}-b{budget}-{digest}"


def _check(jobs: Sequence[Job]) -> None:
    """Build each behaviour and each (workload, budget) once: mistakes must not surface after an hour."""
    seen: set[str] = set()
    if len({job.args.reward for job in jobs}) > 1:
        raise ValueError("a store holds one reward, and these jobs have several; record them into several stores")
    for job in jobs:
        name, place = behaviour_name(job.behaviour), f"{workload_name(job.workload)} {job.budget!r}"
        if name not in seen:
            behaviour_of(job.behaviour, job.run_id, job.args.seed, job.args.reward)
        if place not in seen:
            _start(job)
        seen |= {name, place}


def _start(job: Job) -> TrainingRun:
    return start_run(job.workload, job.seed, job.budget, "hold", job.args)


def _salvage(root: Path) -> None:
    """Bring in what an earlier, killed collection left behind."""
    from mango_env.salvage import salvage

    if (root / "data").is_dir():
        salvage(root)


def remaining_jobs(jobs: Sequence[Job], root: Path) -> Iterator[Job]:
    """Jobs whose run is not in the store, or of which some layers are missing."""
    from mango_env.dataset import recorded_layers

    have = recorded_layers(root)
    for job in jobs:
        layers, total = have.get(job.run_id, (set(), 0))
        missing = tuple(sorted(set(range(total)) - layers))
        if not layers or missing:
            yield replace(job, missing=missing if layers else None)


class _MissingOnly:
    """A writer that drops the episodes that the store has."""

    def __init__(self, writer: TrajectoryWriter, layers: Sequence[int]) -> None:
        self.header, self._writer, self._layers = writer.header, writer, set(layers)

    def add(self, episode: Any) -> None:
        if episode.attributes["layer_index"] in self._layers:
            self._writer.add(episode)


def record_job(job: Job, writer: TrajectoryWriter) -> RunSummary:
    return next(_record_group([job], writer))


def groups(jobs: Sequence[Job], batch: int, workers: int = 1) -> list[list[Job]]:
    """Jobs of one workload and the same settings, at most `batch` in a group and at least a group for every worker."""
    if batch == 1:
        return [[job] for job in jobs]
    found: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        found.setdefault((workload_name(job.workload), job.args.horizon, job.args.interval), []).append(job)
    cut = [(alike, min(batch, -(-len(alike) // workers))) for alike in found.values()]
    return [alike[i : i + size] for alike, size in cut for i in range(0, len(alike), size)]


def _record_group(group: Sequence[Job], writer: TrajectoryWriter) -> Iterator[RunSummary]:
    """Record jobs side by side, or one after the other where their runs cannot be batched."""
    first = _recording(group[0])
    if len(group) > 1 and batchable(first.run):
        recordings = [first, *(_recording(job) for job in group[1:])]
        yield from record_batch(recordings, [_target(job, writer) for job in group])
        return
    yield first.record(_target(group[0], writer))
    for job in group[1:]:
        yield _recording(job).record(_target(job, writer))


def _recording(job: Job) -> Recording:
    behaviour = behaviour_of(job.behaviour, job.run_id, job.args.seed, job.args.reward)
    return Recording(_start(job), behaviour, job.args.reward, behaviour_name(job.behaviour), job.run_id)


def _target(job: Job, writer: TrajectoryWriter) -> Any:
    return writer if job.missing is None else _MissingOnly(writer, job.missing)


def open_writer(root: Path, label: str, args: CollectArgs, index: bool = True) -> TrajectoryWriter:
    return TrajectoryWriter(root, task=label, policy="mixed", reward=args.reward, index=index)


def _record_here(
    jobs: Sequence[Job], root: Path, label: str, workers: int, batch: int, index: bool = True
) -> Generator[RunSummary, None, None]:
    if jobs:
        with open_writer(root, label, jobs[0].args, index) as writer:
            for group in groups(jobs, batch):
                yield from _record_group(group, writer)


def _record_in_processes(
    jobs: Sequence[Job], root: Path, label: str, workers: int, batch: int
) -> Generator[RunSummary, None, None]:
    """A few jobs at a time to spawned processes; the index is rebuilt once, whatever happens."""
    size = max(1, min(8, len(jobs) // (4 * workers)))
    tasks = groups(jobs, batch, workers) if batch > 1 else [list(jobs[i : i + size]) for i in range(0, len(jobs), size)]
    pool = worker_pool(min(workers, len(jobs)), begin_recorder)
    others, waiting = active_children(), set[Future[list[RunSummary]]]()
    try:
        with interrupts_held(), _sigint_blocked():           # which the processes that start here inherit
            waiting = {pool.submit(_record_task, task, root, label, batch) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()
    finally:
        with interrupts_held():
            started = [child for child in active_children() if child not in others]
            _interrupt(started, {future for future in waiting if not future.cancel()})
            pool.shutdown(wait=True, cancel_futures=True)
            if (root / "data").is_dir():
                finalize(root)


def _record_task(jobs: Sequence[Job], root: Path, label: str, batch: int) -> list[RunSummary]:
    with interrupted_once():
        return list(_record_here(jobs, root, label, 1, batch, index=False))


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_recorder() -> None:
    """A worker listens to Ctrl-C only while it records: dying at any other time it would take the other workers along."""
    begin_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _interrupt(workers: Sequence[BaseProcess], running: set[Future[list[RunSummary]]]) -> None:
    """Have the workers close their shards, and wait for it. Asked again, since they do not listen all the time."""
    pause = 0.0
    while wait(running, timeout=pause).not_done:
        for worker in workers:
            if worker.is_alive() and worker.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGINT)
        pause = 0.5


def _summary(root: Path, results: Sequence[RunSummary], skipped: int, seconds: float) -> CollectSummary:
    by_policy: dict[str, list[float]] = {}
    for result in results:
        by_policy.setdefault(result.policy, []).append(result.returns)
    return CollectSummary(
        root=str(root),
        recorded=len(results),
        skipped=skipped,
        diverged=sum(result.diverged for result in results),
        episodes=sum(result.episodes for result in results),
        decisions=sum(result.decisions * result.episodes for result in results),
        seconds=seconds,
        returns={name: float(np.mean(values)) for name, values in sorted(by_policy.items())},
        over_budget=sum(result.state_bytes_peak > result.budget_bytes for result in results),
    )
