"""How much of the costs that were learned does a policy's allocation lose, and how much would fewer runs have changed them?

    python -m experiments.cost_fidelity --out benchmarks/results/cost_fidelity.json      # minutes

Costs (train_policy/additive.py) are fitted to all runs of a store. On decisions of some of its runs the knapsack divides every
budget by these costs, by the scores of policies, and by costs that were fitted to a share of the runs drawn at random. `best` is
what the best allocation is expected to lose, `lost` what another loses beyond that, by the costs of all runs; the unit is what
final losses of random allocations differ by (their standard deviation), and `equal` the share of layers with the same rung.
A fit to half of the runs is about as far from the fit to all as that is from the truth, if runs are all that errs (both have the
variance of one fit to all), so its row says what there is to gain by more of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import parse, stamp, write
from experiments.transfer import names
from experiments.trunk_variants import costs_of, decisions
from mango.budget import MemoryBudget
from mango_env.cache import TrajectoryCache, build_cache
from train_policy.additive import AdditivePolicy, Costs, Outcomes, fit, outcomes_of
from train_policy.evaluate import policy_of, spec_name


@dataclass(frozen=True)
class Args:
    data: Path = Path("trajectories/universal.h5")       # what `universal` learned from, or another store
    policies: str = "universal"                          # shipped names, paths, water-filling; all that give scores
    budgets: str = "0.03125,0.0625,0.125,0.25"           # of AdamW's state bytes
    shares: str = "0.5,0.8"                              # of the runs that costs are fitted to anew
    draws: int = 3                                       # subsets per share
    runs: int = 60                                       # whose decisions are asked for, drawn at random
    every: int = 2                                       # decisions of a run: one of so many
    seed: int = 0
    out: Path = Path("runs/cost_fidelity.json")


@dataclass(frozen=True)
class Case:
    """One decision under one budget."""

    rule: str
    budget: float
    limit: MemoryBudget
    nbytes: NDArray[np.int64]                            # (L, R)
    obs: Tensor                                          # (L, 64)
    costs: NDArray[np.float64]                           # (L, R) by all runs
    best: NDArray[np.int64]                              # (L,) the rungs of the least cost that fit

    def cost(self, rungs: NDArray[np.int64]) -> float:
        return float(self.costs[np.arange(len(rungs)), rungs].sum())


def cases(cache: TrajectoryCache, costs: Costs, args: Args) -> Iterator[Case]:
    runs = list(decisions(cache))
    picked = np.random.default_rng(args.seed).permutation(len(runs))[: args.runs]
    for work, rule, obs in (runs[at] for at in picked):
        nbytes, fixed, adamw = costs_of(work, rule)
        limits = {size: MemoryBudget(int(size * adamw), fixed) for size in map(float, names(args.budgets))}
        for now in obs[:: args.every]:
            truth = costs(now).double().numpy()
            for size, limit in limits.items():
                if int(nbytes.min(1).sum()) <= limit.available:
                    yield Case(rule, size, limit, nbytes, now, truth, limit.allocate(-truth, nbytes))


def measure(asked: Sequence[Case], policy: Any) -> list[dict[str, Any]]:
    """Per rule and budget: the least cost, what the policy's allocation costs beyond it, and how many rungs agree."""
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for case in asked:
        own, least = case.limit.allocate(policy.scores(case.obs).double().numpy(), case.nbytes), case.cost(case.best)
        found.setdefault((case.rule, case.budget), []).append((least, case.cost(own) - least, float((case.best == own).mean())))
    return [
        {"rule": rule, "budget": size, "decisions": len(rows)}
        | {name: fmean(row[at] for row in rows) for at, name in enumerate(("best", "lost", "equal"))}
        for (rule, size), rows in sorted(found.items())
    ]


def without(data: Outcomes, share: float, generator: np.random.Generator) -> Outcomes:
    """A share of the runs at random; what was not compressed, the twins, stays."""
    twin = ~data.rows[next(iter(data.rows))].any(1)
    return data.some(twin | (generator.random(len(data)) < share))


def train(args: Args) -> Path:
    torch.set_num_threads(1)
    cache = build_cache(args.data)
    data = outcomes_of(cache)
    fitted = fit(data, cache.header.ladder)
    asked = list(cases(cache, fitted.costs, args))
    rows: list[dict[str, Any]] = []
    facts = {"digest": cache.digest, "runs": len(data), "explained_elsewhere": fitted.explained_elsewhere}

    def keep(name: str, policy: Any) -> None:
        mine = [{"policy": name} | row for row in measure(asked, policy)]
        rows.extend(mine)
        write(args.out, stamp(args) | facts | {"rows": rows})
        print("\n".join("{policy:24s} {rule:6s} {budget:<8g} best {best:.3f}, lost {lost:+.3f}, equal {equal:.2f}".format(**one)
                        for one in mine), flush=True)  # fmt: skip

    for spec in names(args.policies):
        keep(spec_name(spec), policy_of(spec))
    generator = np.random.default_rng(args.seed)
    for share in names(args.shares):
        for draw in range(args.draws):
            again = fit(without(data, float(share), generator), cache.header.ladder).costs
            keep(f"{share} of the runs, draw {draw}", AdditivePolicy(again))
    return args.out


if __name__ == "__main__":
    print(f"wrote {train(parse(Args, __doc__))}")
