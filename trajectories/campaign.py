"""A collection campaign: thousands of training runs drawn from documented ranges, recorded into one store.

    python -m trajectories.campaign --root runs/campaign --workers 2
    python -m trajectories.campaign --root runs/campaign --engine ray --workers 64     # on a Ray cluster

Run number n is drawn from the configuration by (its seed, n) alone, so a campaign that was killed goes on where it was,
and asking for more runs extends it. Beside the store it writes `campaign.json` (what was asked, by which code) and
`card.md` (what the data covers). Families of the final evaluation are refused.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mango.config import LADDER
from mango.rules import CHOICES
from mango_env.card import write_card
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from mango_env.schedules import check_schedule
from mango_env.workloads import split_options
from mango_env.workloads.base import HELD_OUT
from train_policy.behaviours import behaviour_of
from train_policy.cli_support import write_json
from train_policy.collect import CollectArgs, CollectSummary, Job, record_jobs, run_id
from train_policy.provenance import about

CONFIG = Path(__file__).with_name("campaign.yml")
ENGINES = ("processes", "ray")


@dataclass(frozen=True)
class Range:
    """Drawn log-uniformly."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"low={self.low!r} and high={self.high!r} must be positive, and low no larger")

    def draw(self, generator: np.random.Generator) -> float:
        return float(np.exp(generator.uniform(np.log(self.low), np.log(self.high))))


@dataclass(frozen=True)
class Rule:
    weight: float
    lr: float = 1.0                                          # its rate over AdamW's
    matrix_lr_scale: float = 1.0                             # Muon's rate for matrices over that


@dataclass(frozen=True)
class Family:
    weight: float
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    lr: Mapping[str, float] = field(default_factory=dict)    # by rule; of the others the workload's own times the rule's


@dataclass(frozen=True)
class Campaign:
    """The ranges; see campaign.yml."""

    families: Mapping[str, Family]
    behaviours: Mapping[str, float]
    rules: Mapping[str, Rule]
    schedules: Mapping[str, float]
    horizon: Sequence[int]
    interval: Sequence[int]
    budgets: Sequence[float]
    lr_factor: Range = Range(1.0, 1.0)
    seed: int = 0
    seeds: int = 2**31                                       # seeds that runs are drawn from: runs of one seed share their twin
    runs: int = 1000
    reward: Reward = Reward()
    max_grad_norm: float | None = None                       # of all runs

    def __post_init__(self) -> None:
        for name in ("families", "behaviours", "rules", "schedules", "horizon", "interval", "budgets"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; a campaign draws every run from it")
        weights = [*self.behaviours.values(), *self.schedules.values()]
        weights += [one.weight for one in self.families.values()] + [one.weight for one in self.rules.values()]
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights must be positive numbers, got {sorted(weights)[0]!r}")
        held_out = sorted({str(split_options(name)[0]) for name in self.families} & set(HELD_OUT))
        if held_out:
            raise ValueError(f"families {held_out} are held out for the final evaluation; no policy may be trained on them")
        rates = [rate for one in self.families.values() for rate in one.lr.values()]
        if not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"learning rates must be positive numbers, got {min(rates)!r}")
        unknown = sorted({*self.rules, *(rule for one in self.families.values() for rule in one.lr)} - set(CHOICES))
        if unknown:
            raise ValueError(f"unknown rules {unknown}; known: {', '.join(CHOICES)}")
        for schedule in self.schedules:
            check_schedule(schedule)
        for behaviour in self.behaviours:
            if behaviour != "fixed":
                behaviour_of(behaviour, "")

    @property
    def digest(self) -> str:
        """Names the ranges; how many runs are drawn from them is not part of it."""
        facts = asdict(self) | {"runs": None}
        if self.max_grad_norm is None:                       # campaigns from before there was clipping keep their digest
            del facts["max_grad_norm"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()[:12]

    def job(self, number: int) -> Job:
        """Run number `number`: a function of it and the ranges."""
        generator = np.random.default_rng([self.seed, number])
        family = _weighted(generator, {name: one.weight for name, one in self.families.items()})
        options = {name: _one_of(generator, values) for name, values in sorted(self.families[family].options.items())}
        workload = family + "".join(f"+{name}={value}" for name, value in options.items())
        rule = _weighted(generator, {name: one.weight for name, one in self.rules.items()})
        behaviour = _weighted(generator, self.behaviours)
        rung = LADDER.names[int(generator.integers(len(LADDER)))]
        args = CollectArgs(
            horizon=_one_of(generator, self.horizon), interval=_one_of(generator, self.interval), rule=rule,
            schedule=_weighted(generator, self.schedules), matrix_lr_scale=self.rules[rule].matrix_lr_scale,
            max_grad_norm=self.max_grad_norm, reward=self.reward, seed=int(generator.integers(2**31)),
        )  # fmt: skip
        factor, budget = self.lr_factor.draw(generator), _one_of(generator, self.budgets)
        own, least = facts_of(workload, rule)
        usual = self.families[family].lr.get(rule, own * self.rules[rule].lr)
        args = replace(args, lr=float(f"{usual * factor:.3g}"))
        behaviour = f"fixed:{rung}" if behaviour == "fixed" else behaviour
        feasible = [size for size in sorted(self.budgets) if size >= max(budget, least)]
        size = feasible[0] if feasible else math.ceil(100 * least) / 100
        seed = int(generator.integers(self.seeds))
        return Job(run_id(workload, behaviour, seed, size, args), workload, behaviour, seed, size, args)


def _weighted(generator: np.random.Generator, weights: Mapping[str, float]) -> str:
    shares = np.array(list(weights.values()), float)
    return list(weights)[int(generator.choice(len(shares), p=shares / shares.sum()))]


def _one_of(generator: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(generator.integers(len(values)))]


@cache
def facts_of(workload: str, rule: str) -> tuple[float, float]:
    """A workload's own rate, and the least budget that it can be trained under, as a share of AdamW's state."""
    run = TrainingRun(workload, 0, horizon=1, memory_budget=4.0, rule=rule)
    least = int(run.optimizer.allocator.rung_bytes.min(1).values.sum()) + run.optimizer.budget.fixed
    return run.lr, least / run.optimizer.adamw_bytes


def read_campaign(path: str | Path = CONFIG, **overrides: Any) -> Campaign:
    """The ranges of a YAML file; overrides that are not None prevail. ValueError for what a campaign cannot be."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"campaign {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"campaign {path} is a {type(found).__name__}, not a mapping; see trajectories/campaign.yml")
    found |= {name: value for name, value in overrides.items() if value is not None}
    try:
        kinds = {"families": Family, "rules": Rule}
        parts = {name: {key: kind(**one) for key, one in found[name].items()} for name, kind in kinds.items() if name in found}
        single = {"lr_factor": Range, "reward": Reward}
        parts |= {name: kind(**found[name]) for name, kind in single.items() if name in found}
        return Campaign(**(found | parts))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"campaign {path}: {error}; see trajectories/campaign.yml") from error


def run_campaign(
    campaign: Campaign, root: str | Path, *, engine: str = "processes", workers: int = 1, batch: int = 1, progress: bool = False
) -> CollectSummary:
    """Record the campaign's runs that the store at `root` has not, and write campaign.json and card.md beside it."""
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    recorder = None
    if engine == "ray":
        from train_policy.ray_recorder import record_in_ray

        recorder = record_in_ray
    jobs = [campaign.job(number) for number in range(campaign.runs)]
    done = record_jobs(jobs, root, "campaign", workers=workers, batch=batch, progress=progress, run=recorder, check=False)
    facts = {"digest": campaign.digest, "campaign": json.loads(json.dumps(asdict(campaign), default=repr))}
    write_json(Path(root) / "campaign.json", facts | {"about": about(), "summary": done.to_dict()})
    write_card(root, Path(root) / "card.md")
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the store")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the ranges, YAML; default: trajectories/campaign.yml")
    parser.add_argument("--runs", type=int, help="how many; default: as the file says")
    parser.add_argument("--engine", choices=ENGINES, default="processes", help="default: processes")
    parser.add_argument("--workers", type=int, default=1, help="processes or Ray actors; default 1")
    parser.add_argument("--batch", type=int, default=1, help="runs side by side where it pays (`mango collect`); default 1")
    args = parser.parse_args(arguments)
    try:
        campaign = read_campaign(args.config, runs=args.runs)
        done = run_campaign(campaign, args.root, engine=args.engine, workers=args.workers, batch=args.batch, progress=True)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    rate = done.decisions / done.seconds if done.seconds else 0.0
    print(f"{done.recorded} runs recorded, {done.skipped} were there, {done.diverged} diverged, {done.episodes} episodes,"
          f" {done.decisions} decisions in {done.seconds:.0f} s ({rate:.1f}/s); see {args.root / 'card.md'}")  # fmt: skip


if __name__ == "__main__":
    main()
