"""Episodes for tests of the trajectory store: seeded, valid, and recognisable by what stands in their observations."""

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from mango.config import LADDER
from mango.features import FEATURE_INDEX, FEATURES
from mango_env.episode import Episode
from mango_env.reward import Reward
from mango_env.store import TrajectoryWriter

REWARD = Reward()
_LOW, _HIGH = (np.array([getattr(f, side) for f in FEATURES], np.float32) for side in ("low", "high"))


def make_episode(
    run: int = 0,
    layer: int = 0,
    steps: int = 6,
    *,
    truncated: bool = False,
    workload: str = "digits_mlp",
    reward: Reward = REWARD,
) -> Episode:
    """A valid episode of random content, the same for the same arguments. Its `grad_norm` is the tag
    run + layer / 10 + step / 1000, and its last reward is about 100 times the others."""
    rng = np.random.default_rng([run, layer, steps])
    rung = rng.integers(0, len(LADDER), steps).astype(np.int16)
    observations = rng.uniform(_LOW, _HIGH, (steps + 1, len(FEATURES))).astype(np.float32)
    observations[:, FEATURE_INDEX["grad_norm"]] = [tag(run, layer, t) for t in range(steps + 1)]
    loss, memory, error = (rng.uniform(0, 1, steps).astype(np.float32) for _ in range(3))
    loss[-1] = -100
    last = np.arange(steps) == steps - 1
    return Episode(
        observations=observations,
        actions=np.array([LADDER[r].to_action() for r in rung], np.int8),
        rewards=reward.combine(loss, memory, error),
        terminations=last & (not truncated),
        truncations=last & truncated,
        infos={
            "loss": rng.uniform(0, 3, steps),
            "bytes": np.full(steps, 1000.0),
            "error": error,
            "behavior_logp": -rng.uniform(0, 3, steps),
            "rung": rung,
            "reward_loss": loss,
            "reward_memory": memory,
            "reward_error": error,
        },
        attributes={
            "run_id": f"run-{run:04d}",
            "layer_index": layer,
            "layer_name": f"blocks.{layer}.mlp.up.weight",
            "layer_kind": "mlp_up",
            "n_layers": 4,
            "workload": workload,
            "policy": "random",
            "seed": run,
            "budget_bytes": 4096,
            "adamw_bytes": 16384,
            "horizon": 10 * steps,
            "interval": 10,
            "lr": 2e-3,
            "rule": "adamw",
            "numel": 2048,
            "reward": reward.to_json(),
            "mango_version": "0.1.0",
        },
    )


def tag(run: int, layer: int, step: int) -> np.float32:
    """What marks step `step` of layer `layer` of run `run` in the feature `grad_norm`."""
    return np.float32(run + layer / 10 + step / 1000)


def record(root: Path, runs: int = 4, layers: int = 2, steps: int = 6, **options: Any) -> list[Episode]:
    """A store of runs x layers episodes in shards of 3; returns them in the order of the index."""
    made = [make_episode(run, layer, steps, **options) for run in range(runs) for layer in range(layers)]
    with writer(root, episodes_per_shard=3, reward=options.get("reward", REWARD)) as w:
        for episode in made:
            w.add(episode)
    return made


def writer(root: Path, **options: Any) -> TrajectoryWriter:
    return TrajectoryWriter(root, **{"task": "digits_mlp", "policy": "random", "reward": REWARD, **options})


def same(a: Episode, b: Episode) -> bool:
    """Equal in every value and attribute."""
    return a.digest() == b.digest()


def edit_metadata(root: Path, **changes: Any) -> None:
    """Overwrite keys of the metadata's "mango" part."""
    path = root / "data" / "metadata.json"
    content = json.loads(path.read_text())
    content["mango"] |= changes
    path.write_text(json.dumps(content))


# Processes of their own, forked from one that has imported everything: a tenth of a second instead of three.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.made_episodes", "mango_env.cache"])


def start(target: Any, *args: Any) -> Any:
    """A started process that runs a function of this module."""
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    return process


def finish(process: Any) -> int:
    """Wait for a process; its exit code."""
    process.join()
    code: int = process.exitcode
    process.close()
    return code


def record_run(root: Path, run: int, layers: int) -> None:
    with writer(root, episodes_per_shard=2) as w:
        for layer in range(layers):
            w.add(make_episode(run, layer))


def record_until_killed(told: Any, root: Path, run: int, per_shard: int) -> None:
    """Record episodes without end, telling of each once it is flushed."""
    with writer(root, episodes_per_shard=per_shard) as w:
        for layer in range(10**6):
            w.add(make_episode(run, layer, steps=1 + layer % 7))
            told.send(layer)


def record_until_interrupted(asked: Any, root: Path) -> None:
    """Record a store into each folder that is asked for, until Ctrl-C; tell when it begins and how many episodes it added."""
    while (i := asked.recv()) is not None:
        added = 0
        try:
            with writer(root / str(i), episodes_per_shard=3) as w:
                asked.send("recording")
                for layer in range(10**6):
                    w.add(make_episode(i, layer))
                    added += 1
        except KeyboardInterrupt:
            asked.send(added)


def build_cache_killed_after(root: Path, episodes: int) -> None:
    """Start to build a cache and end by SIGKILL after some episodes; never for 0."""
    from mango_env import cache

    append, count = cache._append, itertools.count(1)

    def killing(files: Any, episode: Episode) -> None:
        append(files, episode)
        if next(count) == episodes:
            os.kill(os.getpid(), signal.SIGKILL)

    cache._append = killing
    cache.build_cache(root)
