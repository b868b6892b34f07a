"""Check a trajectory store: is every episode what the standard (`trajectories/README.md`) says, and what was recorded?"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mango.config import CompressionConfig
from mango.features import FEATURES
from mango_env.dataset import TrajectoryDataset
from mango_env.episode import Episode
from mango_env.layout import Header, Paths
from mango_env.shards import SUFFIX
from mango_env.store import digest_of

REWARD_TOLERANCE = 1e-6                 # relative to the largest term: rewards are float32 sums of three float32 products
_LOW = np.array([f.low for f in FEATURES], np.float32)
_HIGH = np.array([f.high for f in FEATURES], np.float32)


@dataclass(frozen=True)
class Problem:
    """`check` says what was checked, `where` in which file or episode, `message` what was expected and what was found."""

    check: str
    where: str
    message: str


@dataclass(frozen=True)
class Report:
    """What `validate` found. `problems` make a store unfit for training, `warnings` are worth a look."""

    path: str
    episodes: int
    transitions: int
    runs: int
    digest: str
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        """A short text: the verdict, then one line per finding."""
        verdict = "valid" if self.ok else f"{len(self.problems)} problems"
        lines = [f"{self.path}: {self.episodes} episodes of {self.runs} runs, {self.transitions} decisions: {verdict}"]
        lines += [f"  {p.check}: {p.message} ({p.where})" for p in self.problems]
        return "\n".join([*lines, *(f"  note, {w.check}: {w.message} ({w.where})" for w in self.warnings)])


def validate(root: str | os.PathLike[str]) -> Report:
    """Read everything once and compare it with the standard, with its hashes and with itself.

    Per episode: shapes, lengths, dtypes, finite values, indices on the menu and flags (`Episode`), content hash, rewards
    recomputed from their logged terms, rungs. Over all: schema and menus, duplicates, counts, digest, what lies about.

    Raises ValueError where there is no store of this version at all; everything else is in the report.
    """
    dataset = TrajectoryDataset(root)
    problems: list[Problem] = []
    warnings = list(_leftovers(dataset))
    keys: Counter[tuple[str, int]] = Counter()
    digests: list[str] = []
    transitions = 0
    rungs: dict[tuple[int, ...], int] = {}
    for i in range(len(dataset)):
        where = dataset.where(i)
        try:
            episode = next(dataset.episodes([i], check=True))
        except ValueError as error:
            problems.append(Problem("readable", where, str(error)))
            continue
        keys[episode.key] += 1
        digests.append(episode.digest())
        transitions += len(episode)
        problems += _problems(episode, dataset.header, where, rungs)
        warnings += _out_of_range(episode, where)
    for (run_id, layer), count in keys.items():
        if count > 1:
            problems.append(Problem("duplicates", str(dataset.path), f"run {run_id!r}, layer {layer} is recorded {count} times"))
    if len(digests) == len(dataset):
        problems += _totals(dataset, transitions, digest_of(digests))
    runs = len({run_id for run_id, _ in keys})
    found = str(dataset.path), len(dataset), transitions, runs, digest_of(digests)
    return Report(*found, tuple(problems), tuple(warnings))


def _problems(episode: Episode, header: Header, where: str, rungs: dict[tuple[int, ...], int]) -> Iterator[Problem]:
    """What is wrong with an episode that could be read. `rungs` remembers the nearest rung per action."""
    if episode.reward != header.reward:
        yield Problem("reward", where, f"expected weights {header.reward!r}, found {episode.reward!r}")
    terms = [episode.infos[f"reward_{term}"] for term in ("loss", "memory", "error")]
    again = episode.reward.combine(*terms)
    scale = np.maximum(1.0, np.abs(np.stack([*terms, again])).max(0))
    wrong = np.flatnonzero(np.abs(again - episode.rewards) > REWARD_TOLERANCE * scale)
    if len(wrong):
        t = int(wrong[0])
        message = f"expected {again[t]:.7g} from the logged terms at step {t}, found {episode.rewards[t]:.7g}"
        yield Problem("reward", where, f"{message}; {len(wrong)} of {len(episode)} steps differ")
    for t, action in enumerate(map(tuple, episode.actions.tolist())):
        if action not in rungs:
            rungs[action] = header.ladder.nearest(CompressionConfig.from_action(action))
        if rungs[action] != episode.infos["rung"][t]:
            yield Problem("rung", where, f"expected rung {rungs[action]} at step {t}, found {episode.infos['rung'][t]}")
            return


def _out_of_range(episode: Episode, where: str) -> Iterator[Problem]:
    outside = np.argwhere((episode.observations < _LOW) | (episode.observations > _HIGH))
    if len(outside):
        t, f = (int(i) for i in outside[0])
        feature, value = FEATURES[f], episode.observations[t, f]
        message = f"{feature.name} is {value:.7g} at step {t}, outside [{feature.low}, {feature.high}]"
        yield Problem("range", where, f"{message}; {len(outside)} values in all")


def _totals(dataset: TrajectoryDataset, transitions: int, digest: str) -> Iterator[Problem]:
    where = str(dataset.path)
    if transitions != dataset.transitions:
        yield Problem("totals", where, f"expected {dataset.transitions} decisions as the metadata says, found {transitions}")
    if digest != dataset.digest:
        yield Problem("digest", where, f"expected digest {dataset.digest} as the metadata says, found {digest}")


def _leftovers(dataset: TrajectoryDataset) -> Iterator[Problem]:
    """Files that the index does not know: of writers at work or killed, or set aside."""
    if dataset.path.is_file():
        return
    paths = Paths.of(dataset.path)
    for file in sorted(paths.shards.glob(f"*{SUFFIX}.tmp")):
        yield Problem("unfinished", str(file), "a writer is at work, or was killed: `mango data salvage` recovers its episodes")
    indexed = {Path(dataset.where(i).rsplit(":", 1)[0]).name for i in range(len(dataset))}
    for file in sorted(paths.shards.glob(f"*{SUFFIX}")):
        if file.name not in indexed:
            yield Problem("unindexed", str(file), "the index does not know this shard: `mango data salvage` rebuilds it")
    if paths.quarantine.is_dir():
        for file in sorted(paths.quarantine.iterdir()):
            yield Problem("quarantine", str(file), "was set aside because it could not be read in full")
