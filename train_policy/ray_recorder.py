"""Record a collection on Ray: a local one of so many processes, or a cluster whose machines share a folder.

>>> from train_policy.collect import record_jobs
>>> record_jobs(jobs, "runs/data", "digits_mlp", workers=8, run=record_in_ray)             # doctest: +SKIP

Every actor is one process with a writer of its own, and takes one job at a time. An actor that is lost, killed or
crashed, costs the run that it was at: what it had written is brought into the store, and another one does the rest.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mango_env.interrupts import interrupted_once, interrupts_held
from mango_env.recorder import RunSummary
from mango_env.salvage import salvage
from mango_env.store import TrajectoryWriter, finalize
from train_policy.collect import CollectArgs, Job, begin_recorder, open_writer, record_job, remaining_jobs

RETRIES = 2                             # of a job whose actor was lost
STORE_BYTES = 100 << 20                 # of a local Ray's object store: what travels are jobs and summaries
LAST_SIGN_SECONDS = 60.0                # a process that was killed lets go of its shard in this time


class RecordingActor:
    """What runs in an actor's process, all of it in the main thread."""

    writer: TrajectoryWriter

    def open(self, root: str, task: str, args: CollectArgs) -> tuple[str, int, str]:
        """Machine, process, and the name of the writer, by which its files are known."""
        begin_recorder()
        self.writer = open_writer(Path(root), task, args, index=False)
        return socket.gethostname(), os.getpid(), self.writer.name

    def record(self, job: Job) -> RunSummary | None:
        """None where Ctrl-C came in between."""
        try:
            with interrupted_once():
                return record_job(job, self.writer)
        except KeyboardInterrupt:
            return None

    def close(self) -> None:
        if hasattr(self, "writer"):                          # it could be opened
            self.writer.close()


@dataclass
class _Worker:
    """An actor as its employer sees it; the writer's name is empty until it has opened."""

    actor: Any
    host: str = ""
    pid: int = 0
    writer: str = ""
    job: Job | None = None


class _Crew:
    """The workers, what each is busy with, and the jobs that are left."""

    def __init__(self, ray: Any, jobs: Sequence[Job], root: Path, task: str, workers: int) -> None:
        self.ray, self.root, self.task, self.args = ray, root.absolute(), task, jobs[0].args
        self.actor = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(RecordingActor)
        self.left = deque(jobs)
        self.losses = Counter[str]()
        self.busy: dict[Any, _Worker] = {}                   # by the reference of what each will answer
        self.idle: list[_Worker] = []
        for _ in range(min(workers, len(jobs))):
            self._hire()

    def _hire(self) -> None:
        worker = _Worker(self.actor.remote())
        self.busy[worker.actor.open.remote(str(self.root), self.task, self.args)] = worker

    def recording(self) -> bool:
        """Whether a job is left or under way; who is still starting does not count."""
        return bool(self.left) or any(worker.job for worker in self.busy.values())

    def answer(self) -> RunSummary | None:
        """Wait for the next answer, and give its worker something to do. None: it has opened, or it was lost."""
        (ref,), _ = self.ray.wait(list(self.busy))
        with interrupts_held():
            worker = self.busy.pop(ref)
            try:
                told = self.ray.get(ref)
            except self.ray.exceptions.RayTaskError as error:
                self.idle.append(worker)                     # its process is well: what it did raised an error
                raise error.cause from error
            except self.ray.exceptions.RayError as error:
                self._replace(worker, error)
                return None
            done, worker.job = worker.job, None
            if done is None:
                worker.host, worker.pid, worker.writer = told
            elif told is None:
                self.idle.append(worker)
                raise KeyboardInterrupt
            if self.left:
                worker.job = self.left.popleft()
                self.busy[worker.actor.record.remote(worker.job)] = worker
            else:
                self.idle.append(worker)
            return told if done is not None else None

    def _replace(self, worker: _Worker, error: Exception) -> None:
        """Keep what a lost worker wrote, and have another one do the rest. Lost while it started counts for the next job."""
        self._bury(worker)
        job = worker.job or (self.left[0] if self.left else None)
        if job is None:
            return
        self.losses[job.run_id] += 1
        if self.losses[job.run_id] > RETRIES:
            lost = f"{job.run_id}: {self.losses[job.run_id]} actors were lost over this run"
            reason = " ".join(str(error).split())
            raise RuntimeError(f"{lost}; every finished episode is in {self.root} ({reason})") from error
        if worker.job is not None:
            # nothing left to record: its process was lost after the last layer, and is asked for the summary alone
            self.left.appendleft(next(remaining_jobs([job], self.root), replace(job, missing=())))
        self._hire()

    def _bury(self, worker: _Worker) -> None:
        """Make sure that a worker is gone, and bring what it wrote into the store."""
        self.ray.kill(worker.actor)
        deadline = time.monotonic() + LAST_SIGN_SECONDS
        while worker.writer and salvage(self.root, writer=worker.writer).alive:
            if time.monotonic() > deadline:
                raise RuntimeError(f"process {worker.pid} on {worker.host} was lost and still writes to {self.root}; end it")
            time.sleep(0.1)

    def close(self) -> None:
        """Have everybody close their shards, interrupting who is at work, and rebuild the index once."""
        lost, problems = list[_Worker](), list[Exception]()
        while self.busy:
            for worker in self.busy.values():
                self._interrupt(worker)
            answered, _ = self.ray.wait(list(self.busy), num_returns=len(self.busy), timeout=0.5)
            for ref in answered:
                worker = self.busy.pop(ref)
                (self.idle if self._outcome(ref)[0] else lost).append(worker)
        closing = {worker.actor.close.remote(): worker for worker in self.idle}
        for ref, worker in closing.items():
            alive, problem = self._outcome(ref)
            if problem is not None:
                problems.append(problem)
            if alive:
                self.ray.kill(worker.actor)                  # at once, so that its processor is free
            else:
                lost.append(worker)
        for worker in lost:
            self._bury(worker)
        if (self.root / "data").is_dir():
            finalize(self.root)
        if problems:
            raise problems[0]

    def _interrupt(self, worker: _Worker) -> None:
        """Ctrl-C for a worker of this machine, again and again, since it does not listen all the time; others are ended."""
        if worker.job is None or worker.host != socket.gethostname():
            self.ray.kill(worker.actor)
        else:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGINT)

    def _outcome(self, ref: Any) -> tuple[bool, Exception | None]:
        """Whether a worker outlived a call, and the error that the call raised in it."""
        try:
            self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            return True, error.cause
        except self.ray.exceptions.RayError:
            return False, None
        return True, None


def record_in_ray(jobs: Sequence[Job], root: Path, task: str, workers: int) -> Generator[RunSummary, None, None]:
    """Record jobs on Ray: the cluster that `ray.init` connected to, or RAY_ADDRESS names, or a local one of so many workers.

    A job whose actor is lost goes to another one, at most `RETRIES` times; then RuntimeError names it. Ctrl-C keeps every
    finished episode. Other machines must see the store under the same path, and lose the run they are at when it comes.

    Raises ImportError where Ray is not installed, and whatever a job raises.
    """
    if not jobs:
        return
    with _connected(workers) as ray:
        crew = _Crew(ray, jobs, root, task, workers)
        try:
            while crew.recording():
                summary = crew.answer()
                if summary is not None:
                    yield summary
        finally:
            with interrupts_held():
                crew.close()


@contextmanager
def _connected(workers: int) -> Iterator[Any]:
    """Ray, initialised; what was not there before is shut down at the end, and the process left as it was."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('recording on Ray needs ray: pip install "mango-optim[ray]"') from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"address": "local", "num_cpus": workers, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    environment, terminate = set(os.environ), signal.getsignal(signal.SIGTERM)
    set_by_ray = set[str]()
    try:
        with interrupts_held():
            ray.init(**options)
            set_by_ray = set(os.environ) - environment       # for its children
        yield ray
    finally:
        with interrupts_held():
            ray.shutdown()
            for name in set_by_ray:
                os.environ.pop(name, None)
            if terminate is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminate)
