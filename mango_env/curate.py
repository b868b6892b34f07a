"""New stores out of old ones: put together, taken apart by run or by workload, packed into one file to share.

What is there is never changed. A new store is built aside and renamed, so a failed command leaves nothing behind.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mango_env.dataset import TrajectoryDataset, open_datasets
from mango_env.episode import Episode
from mango_env.interrupts import interrupts_held
from mango_env.layout import Header, Paths, as_json, aside, explained, sync, write_text
from mango_env.reward import Reward
from mango_env.shards import ShardWriter
from mango_env.store import TrajectoryWriter, finalize

SPLIT_BY = ("run", "workload")
FILES = (".h5", ".hdf5")


def merge(roots: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, reward: Reward | None = None) -> Path:
    """One store with the episodes of several; the same episode twice counts once. Returns its root.

    With `reward` all rewards are recomputed from the logged terms, which also brings stores of different rewards together.

    Raises ValueError where ladders or, without `reward`, rewards differ, where a run and layer has two different
    episodes, or where `out` holds something already.
    """
    datasets = open_datasets(roots, same_reward=reward is None)
    first = datasets[0].header
    header = Header(
        task=_common([d.header.task for d in datasets]),
        policy=_common([d.header.policy for d in datasets]),
        reward=reward or first.reward,
        ladder=first.ladder,
    )
    chosen: list[tuple[TrajectoryDataset, list[int]]] = []
    seen: dict[tuple[str, int], tuple[str, str]] = {}
    for dataset in datasets:
        fresh = []
        for i, facts in enumerate(dataset.attributes):
            key, found = (facts["run_id"], facts["layer_index"]), (facts["digest"], dataset.where(i))
            known = seen.setdefault(key, found)
            if known[0] != found[0]:
                raise ValueError(f"run {key[0]!r}, layer {key[1]} differs between {known[1]} and {found[1]}; drop one of them")
            if known is found:
                fresh.append(i)
        chosen.append((dataset, fresh))
    episodes = (episode for dataset, indices in chosen for episode in dataset.episodes(indices))
    return _write(Path(out), header, episodes if reward is None else (e.rescored(reward) for e in episodes))


def split(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    by: str = "run",
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Path]:
    """Part a store into `<out>/<name>`, by whole runs or whole workloads, never by step: parts share no run.

    `fractions`: name -> part of the runs (or workloads), summing to 1; by default 0.8 "train" and 0.2 "test". Which goes
    where is drawn with `seed`. Returns the roots.

    Raises ValueError where there are fewer runs (or workloads) than parts.
    """
    fractions = {"train": 0.8, "test": 0.2} if fractions is None else dict(fractions)
    if by not in SPLIT_BY:
        raise ValueError(f"by={by!r} is not one of {SPLIT_BY}; splitting by step would leak")
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions {fractions} must be positive and sum to 1")
    dataset = TrajectoryDataset(root)
    groups = [str(facts["run_id" if by == "run" else "workload"]) for facts in dataset.attributes]
    part = _assign(sorted(set(groups)), fractions, seed, by)
    roots = {}
    for name in fractions:
        header = Header(dataset.header.task, f"{dataset.header.policy}-{name}", dataset.header.reward, dataset.header.ladder)
        indices = [i for i, group in enumerate(groups) if part[group] == name]
        roots[name] = _write(Path(out) / name, header, dataset.episodes(indices))
    return roots


def _assign(groups: Sequence[str], fractions: Mapping[str, float], seed: int, by: str) -> dict[str, str]:
    """Group -> part; every part gets at least one, the others follow the fractions."""
    if len(groups) < len(fractions):
        raise ValueError(f"{len(groups)} {by}s cannot be parted into {', '.join(fractions)}; record more {by}s")
    free = len(groups) - len(fractions)
    wanted = {name: fraction * len(groups) - 1 for name, fraction in fractions.items()}
    counts = dict.fromkeys(fractions, 1)
    for _ in range(free):
        neediest = max(fractions, key=lambda name: wanted[name] + 1 - counts[name])
        counts[neediest] += 1
    shuffled = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    names = [name for name, count in counts.items() for _ in range(count)]
    return dict(zip(shuffled, names, strict=True))


def compact(root: str | os.PathLike[str], out: str | os.PathLike[str], *, compression: str | None = "gzip") -> Path:
    """A whole store packed into one HDF5 file to share: nothing to record into, everything else works as before.

    `out` ending in .h5 or .hdf5 is that file alone. Any other name is a folder that Minari reads, too: the file is its
    `data/main_data.hdf5`, beside `data/metadata.json`. `compression` of the observations: "gzip", "lzf" (faster, known
    to h5py alone) or None. Returns `out`.
    """
    dataset, target = TrajectoryDataset(root), Path(out)
    if target.suffix in FILES:
        if target.exists():
            raise ValueError(f"{target} exists; remove it or choose another name")
        return _pack(dataset, target, compression)
    with _new_folder(target) as folder:
        paths = Paths(folder)
        paths.data.mkdir(parents=True)
        _pack(dataset, paths.index, compression)
        write_text(paths.metadata, as_json({**dataset.metadata, "dataset_id": Paths(target).dataset_id(dataset.header)}))
    return target


def _pack(dataset: TrajectoryDataset, target: Path, compression: str | None) -> Path:
    temporary = aside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shard = ShardWriter(temporary, dataset.header, len(dataset), compression)
        try:
            for episode in dataset:
                shard.add(episode)
            with interrupts_held():
                shard.publish(json.dumps(dataset.metadata))
                os.replace(temporary, target)
        except BaseException:
            shard.abandon()
            raise
        sync(target.parent)
    except BaseException as error:
        temporary.with_name(temporary.name + ".tmp").unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explained(error, f"cannot write {target}", "make room or choose another folder") from error
        raise
    return target


def _common(names: Sequence[str]) -> str:
    return names[0] if len(set(names)) == 1 else "mixed"


def _write(root: Path, header: Header, episodes: Iterator[Episode]) -> Path:
    """A new store at `root`, complete or not at all."""
    task, policy, reward, ladder = header.task, header.policy, header.reward, header.ladder
    with _new_folder(root) as folder, TrajectoryWriter(folder, task=task, policy=policy, reward=reward, ladder=ladder) as writer:
        for episode in episodes:
            writer.add(episode)
    finalize(root)                                           # its name is known only now, and may be Minari's
    return root


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose a new folder")
    temporary = aside(folder)
    try:
        yield temporary
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
