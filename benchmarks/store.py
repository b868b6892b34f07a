"""Speed of the trajectory store: recording against plain h5py, sampling against d3rlpy. Ratios within one run.

    python -m benchmarks.store                      # about a minute; writes benchmarks/results/store.json

Recording: `TrajectoryWriter` (checks, hash, flush per episode, fsync, rename, index) against a loop of h5py calls that
writes the same groups, datasets and attributes into files of as many episodes, and does nothing else. Sampling: batches
of observations, actions, rewards and next observations from `TrajectoryCache` against d3rlpy's replay buffer over the
same episodes, held in memory. Contestants take turns; medians over the turns, and their spread, are written.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np

from benchmarks.record import parse, stamp, write
from mango.config import LADDER
from mango.features import FEATURES
from mango_env.adapters import to_d3rlpy
from mango_env.cache import TrajectoryCache, build_cache
from mango_env.episode import Episode
from mango_env.reward import Reward
from mango_env.store import TrajectoryWriter

REWARD = Reward()
TARGETS = {"recording_ratio": 0.8, "sampling_batches_per_second": 5000.0, "sampling_ratio": 30.0}


@dataclass
class Args:
    episodes: int = 200             # per turn
    steps: int = 20                 # decisions per episode: a run of 200 optimizer steps
    long_steps: int = 500           # the same again with long episodes
    batch: int = 256                # transitions per batch
    batches: int = 1000             # per turn of the cache; d3rlpy does a fortieth of them
    turns: int = 7                  # per contestant
    seed: int = 0
    folder: str = ""                # where to record; default: a temporary folder, removed afterwards
    out: Path = Path("benchmarks/results/store.json")


Raw = dict[str, Any]                # the arrays of an episode as a recorder has them


def draw(rng: np.random.Generator, steps: int, number: int) -> Raw:
    """One random episode, as arguments of `Episode`."""
    rung = rng.integers(0, len(LADDER), steps)
    low, high = (np.array([getattr(f, side) for f in FEATURES]) for side in ("low", "high"))
    terms = {f"reward_{name}": rng.random(steps, np.float32) for name in ("loss", "memory", "error")}
    logged = {name: rng.random(steps, np.float32) for name in ("loss", "bytes", "error", "behavior_logp")}
    return {
        "observations": rng.uniform(low, high, (steps + 1, len(FEATURES))).astype(np.float32),
        "actions": np.array([LADDER[r].to_action() for r in rung], np.int8),
        "rewards": REWARD.combine(*terms.values()),
        "terminations": np.arange(steps) == steps - 1,
        "truncations": np.zeros(steps, bool),
        "infos": {**logged, **terms, "rung": rung.astype(np.int16)},
        "attributes": {
            "run_id": f"digits_mlp-random-{number // 8}",
            "layer_index": number % 8,
            "layer_name": f"blocks.{number % 8}.mlp.up.weight",
            "layer_kind": "mlp_up",
            "n_layers": 8,
            "workload": "digits_mlp",
            "policy": "random",
            "seed": number // 8,
            "budget_bytes": 65536,
            "adamw_bytes": 262144,
            "horizon": 10 * steps,
            "interval": 10,
            "lr": 2e-3,
            "rule": "adamw",
            "numel": 4096,
            "reward": REWARD.to_json(),
            "mango_version": "0.1.0",
        },
    }


def record_store(folder: Path, episodes: Sequence[Raw]) -> None:
    with TrajectoryWriter(folder, task="benchmark", policy="random", reward=REWARD) as writer:
        for episode in episodes:
            writer.add(Episode(**episode))


def record_plain(folder: Path, episodes: Sequence[Raw], per_file: int = 50) -> None:
    """The same groups with h5py and nothing else: what a user would write first."""
    folder.mkdir()
    for start in range(0, len(episodes), per_file):
        with h5py.File(folder / f"{start}.h5", "w") as file:
            for j, episode in enumerate(episodes[start : start + per_file]):
                group = file.create_group(f"episode_{j}")
                for name in ("observations", "actions", "rewards", "terminations", "truncations"):
                    group.create_dataset(name, data=episode[name])
                infos = group.create_group("infos")
                for name, values in episode["infos"].items():
                    infos.create_dataset(name, data=values)
                for name, value in episode["attributes"].items():
                    group.attrs[name] = value
                group.attrs["total_steps"] = len(episode["rewards"])


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def recording(args: Args, steps: int, folder: Path) -> dict[str, Any]:
    """Seconds of both recorders, turn by turn, over the same episodes."""
    rng = np.random.default_rng(args.seed)
    episodes = [draw(rng, steps, number) for number in range(args.episodes)]
    nbytes = sum(e["observations"].nbytes + e["actions"].nbytes + 4 * len(e["rewards"]) for e in episodes)
    seconds: dict[str, list[float]] = {"store": [], "plain": []}
    for turn in range(args.turns + 1):                       # the first warms up and does not count
        for name, record in (("store", record_store), ("plain", record_plain)):
            target = folder / f"{name}-{steps}-{turn}"
            took = timed(lambda record=record, target=target: record(target, episodes))  # type: ignore[misc]
            if turn:
                seconds[name].append(took)
    ratios = [plain / store for store, plain in zip(seconds["store"], seconds["plain"], strict=True)]
    return {
        "steps": steps,
        "episodes": args.episodes,
        "store_episodes_per_second": args.episodes / median(seconds["store"]),
        "plain_episodes_per_second": args.episodes / median(seconds["plain"]),
        "store_megabytes_per_second": nbytes / 1e6 / median(seconds["store"]),
        "ratio": spread(ratios),
    }


def sampling(args: Args, folder: Path) -> dict[str, Any]:
    """Batches per second of both samplers, turn by turn, over the same episodes."""
    rng = np.random.default_rng(args.seed)
    record_store(folder / "sampled", [draw(rng, args.long_steps, number) for number in range(args.episodes)])
    took = timed(lambda: build_cache(folder / "sampled"))
    cache = build_cache(folder / "sampled")
    buffer = to_d3rlpy(in_memory(cache))
    few = max(1, args.batches // 40)
    rates: dict[str, list[float]] = {"cache": [], "d3rlpy": []}
    for turn in range(args.turns + 1):
        ours = args.batches / timed(lambda: [cache.sample(args.batch, rng) for _ in range(args.batches)])
        theirs = few / timed(lambda: [buffer.sample_transition_batch(args.batch) for _ in range(few)])
        if turn:
            rates["cache"].append(ours)
            rates["d3rlpy"].append(theirs)
    return {
        "transitions": len(cache),
        "batch": args.batch,
        "build_megabytes_per_second": sum(f.stat().st_size for f in cache.path.iterdir()) / 1e6 / took,
        "cache_batches_per_second": spread(rates["cache"]),
        "d3rlpy_batches_per_second": spread(rates["d3rlpy"]),
        "ratio": spread([ours / theirs for ours, theirs in zip(rates["cache"], rates["d3rlpy"], strict=True)]),
    }


def in_memory(cache: TrajectoryCache) -> TrajectoryCache:
    """The same cache with its columns read into memory: d3rlpy at its best."""
    columns = {name: np.array(column) for name, column in cache.columns.items()}
    return TrajectoryCache(cache.path, cache.header, cache.digest, columns, cache.begins, cache.lengths, cache.indices)


def run(args: Args) -> Path:
    with tempfile.TemporaryDirectory(dir=args.folder or None) as name:
        folder = Path(name)
        short, long = (recording(args, steps, folder) for steps in (args.steps, args.long_steps))
        sampled = sampling(args, folder)
    reached = {
        "recording": min(short["ratio"]["median"], long["ratio"]["median"]) >= TARGETS["recording_ratio"],
        "sampling": sampled["cache_batches_per_second"]["median"] >= TARGETS["sampling_batches_per_second"]
        or sampled["ratio"]["median"] >= TARGETS["sampling_ratio"],
    }
    result = {**stamp(args), "targets": TARGETS, "reached": reached, "recording": [short, long], "sampling": sampled}
    for kind in (short, long):
        print(
            f"recording, {kind['steps']} steps: {kind['store_episodes_per_second']:.0f} episodes/s, "
            f"{kind['ratio']['median']:.2f}x of plain h5py ({kind['ratio']['min']:.2f} to {kind['ratio']['max']:.2f})"
        )
    print(
        f"sampling: {sampled['cache_batches_per_second']['median']:.0f} batches of {args.batch} per second, "
        f"{sampled['ratio']['median']:.0f}x of d3rlpy ({sampled['ratio']['min']:.0f} to {sampled['ratio']['max']:.0f})"
    )
    return write(args.out, result)


def main() -> None:
    print(run(parse(Args, __doc__)))


if __name__ == "__main__":
    main()
