"""A dataset card: what a trajectory store covers, and what a reader must know, as Markdown made from the data alone.

>>> card_of("runs/data").warnings                                                      # doctest: +SKIP
('a single behaviour recorded it: random', ...)
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mango.features import FEATURE_INDEX, KINDS
from mango_env.dataset import TrajectoryDataset
from mango_env.episode import Episode
from mango_env.layout import FORMAT_VERSION, aside, write_text
from mango_env.reward import LOSS_CLIP

PHASES = ("first third", "second third", "last third")
TERMS = ("reward_loss", "reward_memory", "reward_error")
HARDLY = 0.01                           # of a layer kind's decisions: a rung with fewer is hardly covered
FEW = 100                               # decisions of a layer kind from which on its rungs are judged
MANY_DIVERGED = 0.05                    # of the runs
BUDGET_BANDS = (-4, -3, -2, -1, 0)      # powers of two, of AdamW's bytes, that are expected to be covered
MOST_VALUES = 12                        # more different numbers than this are told by powers of two
NOT_CONSTANT = 1e-4                     # progress is stored as float32: a third is not quite one


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the returns of episodes. `sd` is that of a sample, 0 of a single one."""

    n: int
    mean: float
    sd: float
    min: float
    max: float
    per_decision: float                                      # mean reward, so that horizons can be compared


@dataclass(frozen=True, slots=True)
class Card:
    """Counts are (runs, episodes) by value, `coverage` decisions by layer kind, third of the run and rung."""

    dataset_id: str
    digest: str
    format_version: int
    schema_hash: str
    knobs_version: int
    ladder: tuple[str, ...]
    reward: dict[str, Any]
    mango_versions: tuple[str, ...]
    episodes: int
    runs: int
    transitions: int
    bytes: int
    counts: dict[str, dict[str, tuple[int, int]]]
    lr: tuple[float, float] | None                           # smallest and largest
    numel: tuple[int, int] | None
    coverage: dict[str, list[list[int]]]                     # (3, R) per kind
    returns: dict[str, Spread]                               # by behaviour, best first
    components: dict[str, dict[str, float]]                  # by behaviour: means over decisions, unweighted
    diverged_runs: int
    truncated_runs: int
    truncated: int                                           # episodes
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """Markdown."""
        return "\n".join(_markdown(self))


@dataclass
class _Returns:
    """Mean and spread of what comes one by one (Welford 1962), and means of the reward's terms over decisions."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    decisions: int = 0
    terms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(TERMS)))

    def add(self, episode: Episode) -> None:
        value = episode.returns
        self.n += 1
        off = value - self.mean
        self.mean += off / self.n
        self.squares += off * (value - self.mean)
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.decisions += len(episode)
        self.terms += [episode.infos[term].sum(dtype=np.float64) for term in TERMS]

    def spread(self) -> Spread:
        sd = math.sqrt(self.squares / (self.n - 1)) if self.n > 1 else 0.0
        return Spread(self.n, self.mean, sd, self.least, self.most, self.mean * self.n / self.decisions)

    def components(self) -> dict[str, float]:
        return dict(zip(TERMS, (self.terms / self.decisions).tolist(), strict=True))


# What is counted, by runs and by episodes, from the attributes of an episode.
COUNTED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "workload": lambda a: a["workload"],
    "behaviour": lambda a: a["policy"],
    "layer kind": lambda a: a["layer_kind"],
    "rule": lambda a: a["rule"],
    "schedule": lambda a: a.get("schedule", "constant"),     # stores from before there were schedules
    "budget": lambda a: _band(a["budget_bytes"] / a["adamw_bytes"]) if a["adamw_bytes"] > 0 and a["budget_bytes"] > 0 else None,
    "horizon": lambda a: a["horizon"],
    "interval": lambda a: a["interval"],
}


def card_of(store: str | os.PathLike[str]) -> Card:
    """Read a store once, an episode at a time, and say what is in it. ValueError where it is none."""
    dataset = TrajectoryDataset(store)
    header, rungs = dataset.header, len(dataset.header.ladder)
    episodes, runs = {name: Counter[Any]() for name in COUNTED}, {name: set[tuple[Any, str]]() for name in COUNTED}
    coverage: dict[str, NDArray[np.int64]] = defaultdict(lambda: np.zeros((len(PHASES), rungs), np.int64))
    returns: dict[str, _Returns] = defaultdict(_Returns)
    all_runs, diverged, truncated_runs, versions = set[str](), set[str](), set[str](), set[str]()
    rates, sizes, truncated = (math.inf, -math.inf), (1 << 63, 0), 0
    for episode in dataset:
        facts = episode.attributes
        run = facts["run_id"]
        for name, of in COUNTED.items():
            value = of(facts)
            episodes[name][value] += 1
            runs[name].add((value, run))
        np.add.at(coverage[facts["layer_kind"]], (_phases(episode), episode.infos["rung"]), 1)
        returns[facts["policy"]].add(episode)
        all_runs.add(run)
        versions.add(facts["mango_version"])
        rates = min(rates[0], facts["lr"]), max(rates[1], facts["lr"])
        sizes = min(sizes[0], facts["numel"]), max(sizes[1], facts["numel"])
        diverged |= {run} if _diverged(episode) else set()
        truncated_runs |= set() if episode.terminated else {run}
        truncated += not episode.terminated
    by_runs = {name: Counter(value for value, _ in found) for name, found in runs.items()}
    counted = {name: {value: (by_runs[name][value], n) for value, n in episodes[name].items()} for name in COUNTED}
    best = sorted(returns, key=lambda name: (-returns[name].mean, name))
    kinds = sorted(coverage, key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))
    gaps = (gap for kind in kinds for gap in _gaps(kind, header.ladder.names, coverage[kind]))
    return Card(
        dataset_id=dataset.id,
        digest=dataset.digest,
        format_version=FORMAT_VERSION,
        schema_hash=header.schema_hash,
        knobs_version=header.knobs_version,
        ladder=tuple(header.ladder.names),
        reward=json.loads(header.reward.to_json()),
        mango_versions=tuple(sorted(versions)),
        episodes=len(dataset),
        runs=len(all_runs),
        transitions=sum(found.decisions for found in returns.values()),
        bytes=dataset.nbytes,
        counts={name: _told(name, found) for name, found in counted.items()},
        lr=rates if len(dataset) else None,
        numel=sizes if len(dataset) else None,
        coverage={kind: coverage[kind].tolist() for kind in kinds},
        returns={name: returns[name].spread() for name in best},
        components={name: returns[name].components() for name in best},
        diverged_runs=len(diverged),
        truncated_runs=len(truncated_runs),
        truncated=truncated,
        warnings=(*_narrow(counted, len(all_runs)), *gaps, *_cut_short(len(all_runs), len(diverged), len(truncated_runs))),
    )


def write_card(store: str | os.PathLike[str], out: str | os.PathLike[str]) -> Card:
    """Write a store's card to a Markdown file, aside first, and return it."""
    card, path = card_of(store), Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(aside(path), f"{card}\n")
    os.replace(aside(path), path)
    return card


def _phases(episode: Episode) -> NDArray[np.int64]:
    """The third of the run of each decision (T,), by the feature `progress`, by its place where the length was unknown."""
    steps, progress = len(episode), episode.observations[:-1, FEATURE_INDEX["progress"]].astype(np.float64)
    if not episode.observations[:, FEATURE_INDEX["progress"]].any():
        progress = np.arange(steps) * episode.attributes["interval"] / max(1, episode.attributes["horizon"])
    return np.clip(np.floor(len(PHASES) * progress + NOT_CONSTANT), 0, len(PHASES) - 1).astype(np.int64)


def _diverged(episode: Episode) -> bool:
    """Whether the run ended by divergence: the loss term tells, unless its penalty is less than what any interval may cost."""
    if not episode.terminated:
        return False
    if episode.reward.divergence_penalty >= LOSS_CLIP:
        return bool(episode.infos["reward_loss"][-1] >= LOSS_CLIP)
    return len(episode) < int(episode.attributes["horizon"]) // int(episode.attributes["interval"])


def _band(fraction: float) -> int:
    """The power of two nearest to a budget, a fraction of AdamW's bytes: bytes are rounded, so that bounds must not be there."""
    return round(math.log2(fraction))


def _power(exponent: int) -> str:
    return str(2**exponent) if exponent >= 0 else f"1/{2**-exponent}"


def _told(name: str, found: Mapping[Any, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Counts by the words for a value, in its order; many different numbers by powers of two."""
    numbers = sorted(value for value in found if isinstance(value, int))
    if name == "budget":
        words = {value: f"about {_power(value)} of AdamW's bytes" for value in numbers} | {None: "unknown"}
    elif numbers and len(numbers) > MOST_VALUES:
        words = {value: f"{1 << (value.bit_length() - 1)} to {(1 << value.bit_length()) - 1}" for value in numbers}
    else:
        words = {value: str(value) for value in found}
    told: dict[str, tuple[int, int]] = {}
    for value in [*numbers, *sorted((value for value in found if not isinstance(value, int)), key=str)]:
        runs, episodes = told.get(words[value], (0, 0))
        told[words[value]] = runs + found[value][0], episodes + found[value][1]
    return told


def _narrow(counted: Mapping[str, Mapping[Any, tuple[int, int]]], runs: int) -> Iterator[str]:
    """What a store lacks as a whole."""
    if not runs:
        yield "there are no episodes"
        return
    for name in ("workload", "behaviour", "rule", "schedule", "horizon"):
        if len(counted[name]) == 1:
            (value,) = counted[name]
            yield f"a single {name}: {value}; nothing can be said about others"
    missing = [_power(band) for band in BUDGET_BANDS if band not in counted["budget"]]
    if missing:
        yield f"no budget near {', '.join(missing)} of AdamW's bytes"
    unseen = [kind for kind in KINDS if kind not in counted["layer kind"]]
    if unseen:
        yield f"layer kinds without an episode: {', '.join(unseen)}"


def _gaps(kind: str, ladder: Sequence[str], counts: NDArray[np.int64]) -> Iterator[str]:
    """Rungs (of counts (3, R)) that a layer kind never saw, hardly saw, or saw in some thirds of the run alone."""
    of_rung, decisions = counts.sum(0), int(counts.sum())
    if decisions < FEW:
        yield f"{kind}: only {decisions} decisions"
    seen, often = of_rung > 0, of_rung >= max(1.0, HARDLY * decisions)
    found = {"never": ~seen, f"hardly (below {HARDLY:.0%} of its decisions)": seen & ~often}
    found |= {f"not in the {phase}": often & (counts[i] == 0) for i, phase in enumerate(PHASES)}
    for how, which in found.items():
        if which.any():
            yield f"{kind}: {how}: {', '.join(name for name, at in zip(ladder, which, strict=True) if at)}"


def _cut_short(runs: int, diverged: int, truncated: int) -> Iterator[str]:
    if diverged > MANY_DIVERGED * runs:
        yield f"{diverged} of {runs} runs diverged: their returns are mostly the penalty"
    if truncated:
        yield f"{truncated} of {runs} runs are truncated (stopped, or parts of longer ones): their returns lack the rest"


def _markdown(card: Card) -> Iterator[str]:
    yield f"# {card.dataset_id}\n"
    yield f"{card.episodes:,} episodes of {card.runs:,} runs: {card.transitions:,} decisions, {card.bytes:,} bytes."
    yield "This card was made from the data alone (`mango data card`)."
    yield "\n## What to know first\n"
    yield from (f"- {warning}" for warning in card.warnings) if card.warnings else ("Nothing unusual was found.",)
    yield "\n## Identity\n"
    weights = ", ".join(f"{name} {value}" for name, value in card.reward.items())
    facts = {"digest": f"`{card.digest}`", "format version": card.format_version, "schema hash": f"`{card.schema_hash}`"}
    facts |= {"knobs version": card.knobs_version, "ladder": ", ".join(card.ladder), "reward": weights}
    yield from _table(("", ""), [*facts.items(), ("recorded by mango", ", ".join(card.mango_versions))])
    yield "\n## Contents\n"
    counts = [(name, value, *n) for name, found in card.counts.items() for value, n in found.items()]
    yield from _table(("", "value", "runs", "episodes"), counts)
    if card.lr is not None and card.numel is not None:
        yield f"\nLearning rates {card.lr[0]:g} to {card.lr[1]:g}; layers of {card.numel[0]:,} to {card.numel[1]:,} values."
    yield f"{card.diverged_runs:,} runs diverged, {card.truncated_runs:,} were truncated ({card.truncated:,} episodes)."
    yield "\n## Returns\n\nUndiscounted, of episodes, by who decided; best first.\n"
    columns = ("behaviour", "n", "mean", "sd", "min", "max", "per decision")
    spreads = {name: (s.mean, s.sd, s.min, s.max, s.per_decision) for name, s in card.returns.items()}
    rows_of = ((name, card.returns[name].n, *(f"{x:.4f}" for x in values)) for name, values in spreads.items())
    yield from _table(columns, rows_of)
    yield "\n## Reward components\n\nUnweighted, means over decisions.\n"
    parts = [(name, *(f"{terms[term]:.4f}" for term in TERMS)) for name, terms in card.components.items()]
    yield from _table(("behaviour", *TERMS), parts)
    yield "\n## Coverage of rungs\n\nShare of a layer kind's decisions, by thirds of the run.\n"
    for kind, counted in card.coverage.items():
        table = np.array(counted)
        totals = table.sum(1)
        yield f"### {kind}\n"
        shares = [[_share(n, total) for n, total in zip(column, totals, strict=True)] for column in table.T]
        overall = [_share(n, totals.sum()) for n in table.sum(0)]
        rows = [(name, *share, whole) for name, share, whole in zip(card.ladder, shares, overall, strict=True)]
        yield from _table(("rung", *PHASES, "all"), [*rows, ("decisions", *totals.tolist(), int(totals.sum()))])
        yield ""


def _share(n: int, total: int) -> str:
    return "-" if not total else f"{n / total:.1%}" if n else "0"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row)
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
