"""Promises of recording on Ray: what one process records, each episode once, whatever is killed in between."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mango_env.dataset import TrajectoryDataset, recorded_layers
from mango_env.reward import Reward
from mango_env.validate import validate
from tests.fragile_jobs import KilledOnce, fragile
from train_policy.collect import CollectArgs, Job, collect, record_jobs, run_id
from train_policy.ray_recorder import record_in_ray

ARGS = CollectArgs(horizon=6, interval=3, reward=Reward(loss="raw"))
ROOT = Path(__file__).resolve().parent.parent
TINY = "tests.tiny_workload:tiny"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray that was there before; it is seen to stay."""
    ray = pytest.importorskip("ray", reason='ray is not installed: pip install "mango-optim[ray]"')
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield ray
    assert ray.is_initialized()
    ray.shutdown()


def jobs_of(work: Any, seeds: int, behaviour: Any = "random") -> list[Job]:
    return [Job(run_id(work, behaviour, seed, 1.5, ARGS), work, behaviour, seed, 1.5, ARGS) for seed in range(seeds)]


def digest(root: Path) -> str:
    return TrajectoryDataset(root).digest


def nothing_lies_about(root: Path) -> bool:
    shards = root / "data" / "shards"
    return not [*shards.glob("*.tmp"), *shards.glob("[!.]*.lock"), *shards.glob("*.part")]


def writers(root: Path) -> dict[str, int]:
    """The processes that record, by the names of their writers."""
    return {lock.stem: json.loads(lock.read_text())["pid"] for lock in (root / "data" / "shards").glob("[!.]*.lock")}


def test_a_local_ray_records_what_one_process_records_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason='ray is not installed: pip install "mango-optim[ray]"')
    jobs = jobs_of(TINY, 6)
    here = record_jobs(jobs, tmp_path / "here", "tiny")
    before = dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    there = record_jobs(jobs, tmp_path / "there", "tiny", workers=2, run=record_in_ray)
    assert not ray.is_initialized()
    assert before == (dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert (there.recorded, there.episodes, there.returns) == (6, 12, here.returns)
    assert digest(tmp_path / "here") == digest(tmp_path / "there") and nothing_lies_about(tmp_path / "there")
    again = record_jobs(jobs, tmp_path / "there", "tiny", workers=2, run=record_in_ray)
    assert (again.recorded, again.skipped) == (0, 6)


def test_a_worker_killed_in_the_middle_costs_nothing_but_time(cluster: Any, tmp_path: Path) -> None:
    jobs, root, killed = jobs_of(TINY, 60), tmp_path / "s", list[str]()

    def killing(*args: Any) -> Any:
        for i, summary in enumerate(record_in_ray(*args)):
            yield summary
            if i == 10:
                name, pid = next(iter(writers(root).items()))
                os.kill(pid, signal.SIGKILL)
                killed.append(name)

    done = record_jobs(jobs, root, "tiny", workers=2, run=killing)
    assert done.recorded == 60 and len(killed) == 1
    assert list((root / "data" / "shards").glob(f"{killed[0]}*-salvaged.h5"))        # it had recorded something
    report = validate(root)
    assert report.ok and not report.warnings and report.episodes == 120
    record_jobs(jobs, tmp_path / "whole", "tiny")
    assert digest(root) == digest(tmp_path / "whole") and nothing_lies_about(root)


@pytest.mark.parametrize("added", [0, 1])
def test_layers_that_a_killed_worker_finished_are_not_recorded_twice(added: int, cluster: Any, tmp_path: Path) -> None:
    behaviour, root = KilledOnce(tmp_path / "marker", added), tmp_path / "s"
    jobs = jobs_of(TINY, 2, behaviour)
    done = record_jobs(jobs, root, "tiny", workers=1, run=record_in_ray)
    assert (tmp_path / "marker").exists() and done.recorded == 2
    salvaged = list((root / "data" / "shards").glob("*-salvaged.h5"))
    assert len(salvaged) == added
    report = validate(root)
    assert report.ok and report.episodes == 4
    assert all(len(layers) == total == 2 for layers, total in recorded_layers(root).values())


def test_a_run_whose_summary_was_lost_is_told_of_and_not_recorded_twice(cluster: Any, tmp_path: Path) -> None:
    work = fragile(tmp_path / "deaths", 2)
    done = record_jobs(jobs_of(work, 1), tmp_path / "s", "tiny", workers=1, run=record_in_ray)
    assert len(list((tmp_path / "deaths").iterdir())) == 2 and done.recorded == 1
    assert validate(tmp_path / "s").ok and len(TrajectoryDataset(tmp_path / "s")) == 2


def test_a_run_that_kills_every_worker_is_named_and_the_others_are_kept(cluster: Any, tmp_path: Path) -> None:
    good, bad = jobs_of(TINY, 3), jobs_of(fragile(tmp_path / "deaths", 99), 1)
    with pytest.raises(RuntimeError, match=rf"{bad[0].run_id}: 3 actors were lost over this run"):
        record_jobs([*good, *bad], tmp_path / "s", "tiny", workers=1, run=record_in_ray)
    assert len(list((tmp_path / "deaths").iterdir())) == 3
    layers = recorded_layers(tmp_path / "s")
    assert {job.run_id for job in good} <= set(layers) and validate(tmp_path / "s").ok
    assert nothing_lies_about(tmp_path / "s")


def test_what_a_job_raises_is_raised_here_and_costs_no_worker(cluster: Any, tmp_path: Path) -> None:
    class Broken:
        name = "broken"

        def reset(self) -> None:
            raise ValueError("this policy was never trained")

    with pytest.raises(ValueError, match="never trained"):
        record_jobs([*jobs_of(TINY, 2), *jobs_of(TINY, 1, Broken())], tmp_path / "s", "tiny", workers=1, run=record_in_ray)
    assert len(TrajectoryDataset(tmp_path / "s")) == 4 and nothing_lies_about(tmp_path / "s")


@pytest.mark.parametrize("group", [False, True])
def test_ctrl_c_leaves_every_finished_episode_in_the_store(group: bool, tmp_path: Path) -> None:
    """A real process and a real signal; a terminal sends it to the whole group."""
    pytest.importorskip("ray", reason='ray is not installed: pip install "mango-optim[ray]"')
    code = (
        "from pathlib import Path; from tests.test_ray import *; "
        f"record_jobs(jobs_of(TINY, 5000), Path({str(tmp_path / 's')!r}), 'tiny', workers=2, run=record_in_ray)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "s" / "data" / "shards").glob("*.h5")) and time.monotonic() < deadline:
            time.sleep(0.05)
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert b"KeyboardInterrupt" in errors
    assert nothing_lies_about(tmp_path / "s")
    assert len(TrajectoryDataset(tmp_path / "s")) >= 50
    assert all(len(layers) == total == 2 for layers, total in recorded_layers(tmp_path / "s").values())


def test_without_ray_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "mango-optim\[ray\]"'):
        record_jobs(jobs_of(TINY, 1), tmp_path / "s", "tiny", run=record_in_ray)
    collect(TINY, "random", 1, 1.5, tmp_path / "s", ARGS)
    assert record_jobs(jobs_of(TINY, 1), tmp_path / "s", "tiny", run=record_in_ray).skipped == 1      # nothing to do needs no Ray
