"""Read a trajectory store: a folder as `TrajectoryWriter` leaves it, its `data` folder, or one file made by `compact`."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mango_env.episode import Episode
from mango_env.layout import METADATA_FILE, Header, Paths, dataset_id, read_json
from mango_env.shards import open_shard, read_attributes, read_entries, read_episode
from mango_env.store import metadata


class TrajectoryDataset:
    """The episodes of a store, in its order. Reading one from HDF5 takes milliseconds: train from `build_cache`.

    It is a view of the store as it is now: episodes recorded later are seen by a new `TrajectoryDataset`.

    Raises ValueError saying what was expected and what was found where `path` holds no store, a damaged one, or one of
    another feature schema or other menus.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_file():
            self.index, self.metadata, said_in = self.path, _metadata_inside(self.path), self.path
        else:
            paths = Paths.of(self.path)
            self.index, self.metadata, said_in = paths.index, read_json(paths.metadata), paths.metadata
        self.header = Header.from_dict(self.metadata.get("mango"), said_in)
        with open_shard(self.index) as file:
            links = [_place(file, f"episode_{i}", self.index) for i in range(len(file))]
        expected = self.metadata.get("total_episodes")
        if len(links) != expected:
            raise ValueError(
                f"{self.path}: expected {expected} episodes as {METADATA_FILE} says, found {len(links)} in {self.index.name}; "
                f"rebuild the index with `mango data salvage {self.path}`"
            )
        self._places: list[tuple[Path, str]] = links

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Episode:
        return next(self.episodes([range(len(self))[i]]))

    def __iter__(self) -> Iterator[Episode]:
        return self.episodes()

    @property
    def digest(self) -> str:
        """Hash of what is in it, whatever the order and the files."""
        return str(self.metadata["mango"]["digest"])

    @property
    def transitions(self) -> int:
        """Decisions in all episodes."""
        return int(self.metadata["total_steps"])

    @property
    def nbytes(self) -> int:
        """Size of its files."""
        files = [self.index] if self.path.is_file() else [file for file in self.index.parent.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)

    @property
    def id(self) -> str:
        """Minari's name of it."""
        return str(self.metadata["dataset_id"])

    def where(self, i: int) -> str:
        """File and group of an episode, for messages."""
        file, name = self._places[i]
        return f"{file}:{name}"

    def episodes(self, indices: Iterable[int] | None = None, *, check: bool = False) -> Iterator[Episode]:
        """Stream episodes, all or some. `check` compares each with its hash. Raises ValueError at a damaged one."""
        for i, group in self._groups(indices):
            yield read_episode(group, self.where(i), check)

    @cached_property
    def attributes(self) -> list[dict[str, Any]]:
        """The facts of every episode (`mango_env.episode.ATTRIBUTES`, total_steps, digest), without its arrays."""
        return [read_attributes(group) for _, group in self._groups(None)]

    def _groups(self, indices: Iterable[int] | None) -> Iterator[tuple[int, h5py.Group]]:
        """Open groups one after another; a file stays open while its groups follow each other."""
        wanted = list(range(len(self)) if indices is None else indices)
        at = 0
        while at < len(wanted):
            file = self._places[wanted[at]][0]
            with open_shard(file) as shard:
                while at < len(wanted) and self._places[wanted[at]][0] == file:
                    i = wanted[at]
                    try:
                        group = shard[self._places[i][1]]
                    except (KeyError, OSError, RuntimeError) as error:
                        raise ValueError(f"{self.where(i)}: expected an episode, found none ({error})") from error
                    yield i, group
                    at += 1


def _metadata_inside(file: Path) -> dict[str, Any]:
    """What a file made by `compact` says of itself; a single shard is read as a store, too."""
    with open_shard(file) as opened:
        if "mango_flat" in opened.attrs:
            raise ValueError(f"{file} has flat arrays for training, no episodes; give the store, or a file made by compact")
        text = opened.attrs.get("metadata")
    if isinstance(text, str):
        found: dict[str, Any] = json.loads(text)
        return found
    header, entries = read_entries(file)
    return metadata(header, entries, dataset_id(header.task, header.policy), file.stat().st_size / 1e6)


def _place(file: h5py.File, name: str, index: Path) -> tuple[Path, str]:
    link = file.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        return index.parent / link.filename, link.path.strip("/")
    if link is None:
        raise ValueError(f"{index}: expected episode_0 to episode_{len(file) - 1}, found no {name}")
    return index, name


def open_datasets(paths: Sequence[str | os.PathLike[str]], *, same_reward: bool = True) -> list[TrajectoryDataset]:
    """Several stores of one kind of episodes; ValueError where their ladders or, unless told otherwise, rewards differ."""
    if not paths:
        raise ValueError("no trajectory store was given; name at least one folder")
    datasets = [TrajectoryDataset(path) for path in paths]
    for other in datasets[1:]:
        datasets[0].header.must_match(other.header, other.path, same_reward)
    return datasets


def recorded_layers(root: str | os.PathLike[str]) -> dict[str, tuple[set[int], int]]:
    """Per run in the store: the layers that are recorded, and how many the run has. Empty where there is no store yet."""
    if not Paths.of(root).metadata.exists() and not Path(root).is_file():
        return {}
    runs: dict[str, tuple[set[int], int]] = {}
    for facts in TrajectoryDataset(root).attributes:
        layers, _ = runs.setdefault(facts["run_id"], (set(), int(facts["n_layers"])))
        layers.add(int(facts["layer_index"]))
    return runs


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a store, JSON-able: sizes, runs, workloads, policies, layer kinds, returns, rungs, identity."""
    dataset = TrajectoryDataset(path)
    facts, header = dataset.attributes, dataset.header
    returns, rungs = [], Counter[int]()
    terminated = 0
    for episode in dataset:
        returns.append(episode.returns)
        rungs.update(episode.infos["rung"].tolist())
        terminated += episode.terminated
    names = [rung.name for rung in header.ladder]
    return {
        "path": str(dataset.path),
        "dataset_id": dataset.id,
        "episodes": len(dataset),
        "transitions": dataset.transitions,
        "runs": len({f["run_id"] for f in facts}),
        "terminated": terminated,
        "truncated": len(dataset) - terminated,
        "bytes": dataset.nbytes,
        "workloads": _counts(facts, "workload"),
        "policies": _counts(facts, "policy"),
        "layer_kinds": _counts(facts, "layer_kind"),
        "returns": _spread(returns),
        "rungs": {names[rung] if rung < len(names) else str(rung): n for rung, n in sorted(rungs.items())},
        "reward": json.loads(header.reward.to_json()),
        "schema_hash": header.schema_hash,
        "knobs_version": header.knobs_version,
        "digest": dataset.digest,
    }


def _counts(facts: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    return dict(sorted(Counter(str(f[name]) for f in facts).items()))


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    array = np.asarray(values)
    return {"mean": float(array.mean()), "std": float(array.std()), "min": float(array.min()), "max": float(array.max())}
