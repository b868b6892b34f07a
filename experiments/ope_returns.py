"""Can an estimate from recorded runs choose between policies? Fitted Q evaluation beside real returns.

    python -m experiments.ope_returns              # about five minutes on a core; writes benchmarks/results/ope_returns.json

Runs of one small model are recorded under random, designed and fixed behaviours, without a budget and under one. Fixed rungs,
water-filling, the shipped policies, a clone and an IQL policy learned from the same runs are valued by `train_policy/ope.py`;
then each decides real runs of other seeds, from their first step on, as in the store. Under a budget the action that is
valued is what the knapsack gives the layer beside the other layers of the recorded run. Returns count the default reward, or
its loss term alone, in which case the policies are learned anew. Importance sampling needs behaviours that tell their
probabilities, so it gets runs of its own, in which some of the policies explore, without a budget. The rank correlation has
an interval over policies and seeds, and beside it stands that of one half of the real seeds with the other: more no estimate
can reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from experiments.curvature import ranks
from experiments.transfer import UNLIMITED, names
from mango.config import LADDER
from mango.networks import PolicyNetwork
from mango.policies import FixedPolicy
from mango.policy_file import load_policy
from mango_env.cache import TrajectoryCache, build_cache
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from mango_env.twin import score, twin_of
from train_policy import bc, offline
from train_policy.batches import runs_of
from train_policy.collect import CollectArgs, collect
from train_policy.evaluate import EvaluationArgs, policy_of, start_run
from train_policy.fitting import save_checkpoint
from train_policy.ope import Decider, OpeArgs, fit_values, importance_sampling, over_runs

REWARDS = {"default": Reward(), "loss alone": Reward(beta=0.0, gamma=0.0)}
FIRST_REAL_SEED = 1000                                  # recorded runs have the seeds below
LEARNED = ("bc", "iql")
SHOWN = ("budget", "reward", "policy", "fqe", "real", "real_std", "error")


@dataclass(frozen=True)
class Args:
    workload: str = "digits_mlp"
    rule: str = "adamw"
    budgets: str = "4.0,0.125"                          # of AdamW's state bytes; 4: none
    fixed: str = "m0v0,r32p4q4v0,m2v0,m4v0,m8v0,m8v8,full"     # rungs that are valued, if they fit; all that fit are recorded
    policies: str = "water-filling,demo,universal"      # beside fixed rungs that fit, and those learned here
    explored: str = "fixed:m4v0,water-filling,demo"     # by behaviours that decide as these seven times in ten
    steps: int = 60
    interval: int = 10                                  # optimizer steps per decision
    drawn: int = 24                                     # runs of every random behaviour, each a seed
    fixed_seeds: int = 3                                # runs of every fixed rung
    seeds: int = 10                                     # of real runs
    updates: int = 800                                  # of fitted Q evaluation and of IQL
    batch_size: int = 128                               # of fitted Q evaluation, decisions
    epochs: int = 20                                    # of cloning
    root: Path = Path("runs/ope_returns")               # recorded runs and learned policies
    out: Path = Path("benchmarks/results/ope_returns.json")

    @property
    def run(self) -> EvaluationArgs:
        return EvaluationArgs(horizon=self.steps, interval=self.interval, rule=self.rule)


def fitting_rungs(args: Args, budget: float, among: Sequence[str]) -> list[str]:
    """Those of some rungs that every layer can have at once."""
    run = start_run(args.workload, 0, budget, "hold", args.run)
    rungs = [(name, LADDER[LADDER.index(name)]) for name in among]
    return [name for name, rung in rungs if run.optimizer.allocator.fits([rung] * len(run.layers))]


def record(args: Args, budget: float) -> TrajectoryCache:
    """The recorded runs of a budget."""
    settings = CollectArgs(horizon=args.steps, interval=args.interval, rule=args.rule)
    root = args.root / f"budget-{budget:g}"
    collect(args.workload, ["random", "factorial"], args.drawn, budget, root, settings)
    fixed = [f"fixed:{rung}" for rung in fitting_rungs(args, budget, LADDER.names)]
    collect(args.workload, fixed, args.fixed_seeds, budget, root, settings)
    return build_cache(root)


def rescored(cache: TrajectoryCache, reward: Reward) -> TrajectoryCache:
    """The same runs, paid by other weights."""
    terms = (np.asarray(cache.columns[f"reward_{name}"]) for name in ("loss", "memory", "error"))
    return replace(cache, columns={**cache.columns, "rewards": reward.combine(*terms)})


def learned(name: str, cache: TrajectoryCache, root: Path, args: Args) -> Path:
    """A policy learned from the runs, as a file: a clone of the best, or IQL from that clone."""
    path = root / f"{name}.safetensors"
    if not path.exists():
        if name == "bc":
            network = bc.train(PolicyNetwork("mlp", hidden=(64, 64)), cache, bc.BcArgs(epochs=args.epochs)).network
        else:
            start = load_policy(learned("bc", cache, root, args)).network
            network = offline.train(start, cache, offline.OfflineArgs(algo=name, updates=args.updates)).network
        root.mkdir(parents=True, exist_ok=True)
        save_checkpoint(network, path, head="rung", card={"stage": name, "training_data_digest": cache.digest})
    return path


def allocation(policy: Any, obs: Tensor, run: TrainingRun) -> list[int]:
    """The rung of every layer that the optimizer would apply at observations (L, 64)."""
    if isinstance(policy, FixedPolicy):
        return [tuple(LADDER).index(policy.config)] * len(obs)
    configs = run.optimizer.allocator.resolve(policy.scores(obs), run.optimizer.applied, lambda: obs)
    return [tuple(LADDER).index(config) for config in configs]


def decider_under_budget(policy: Any, cache: TrajectoryCache, run: TrainingRun) -> Decider:
    """The policy on recorded observations, as one-hot rungs (N, R): what the knapsack gives each layer beside the others.

    A table by observation. What is not in it (zeros, which stand for what follows a run's end) gets the cheapest rung.
    """
    table: dict[bytes, int] = {}
    runs, columns = runs_of(cache), cache.columns["observations"]
    for number in range(int(runs.max()) + 1):
        episodes = np.flatnonzero(runs == number)
        policy.reset()
        for step in range(int(cache.lengths[episodes].max()) + 1):
            obs = columns[cache.begins[episodes] + step]                                             # (L, 64)
            for row, rung in zip(obs, allocation(policy, torch.from_numpy(np.array(obs)), run), strict=True):
                table[row.tobytes()] = rung

    def decide(obs: Tensor) -> Tensor:
        return F.one_hot(torch.tensor([table.get(row.tobytes(), 0) for row in obs.numpy()]), len(LADDER)).float()

    return decide


@lru_cache(maxsize=1024)
def real_returns(spec: str, budget: float, seed: int, args: Args) -> dict[str, float]:
    """What a run under the policy returns, mean over layers, by reward."""
    run, policy = start_run(args.workload, seed, budget, "hold", args.run), policy_of(spec)
    found, twin = dict.fromkeys(REWARDS, 0.0), twin_of(run)
    while not run.done:
        rungs = allocation(policy, torch.from_numpy(run.observe()), run)
        run.apply([LADDER[rung] for rung in rungs])
        interval = run.advance()
        for name, reward in REWARDS.items():
            found[name] += score(reward, interval, twin).reward
    return found


def value(name: str, budget: float, paid: str, cache: TrajectoryCache, args: Args) -> dict[str, Any]:
    """One policy under one budget and reward: its estimates, and the real returns by seed."""
    run = start_run(args.workload, 0, budget, "hold", args.run)
    own = args.root / f"budget-{budget:g}" / paid.replace(" ", "-")
    spec = str(learned(name, cache, own, args)) if name in LEARNED else name
    decide = decider_under_budget(policy_of(spec), cache, run)
    starts = torch.from_numpy(cache.columns["observations"].take(cache.begins, 0))
    q = fit_values(decide, cache, OpeArgs(updates=args.updates, batch_size=args.batch_size))
    fqe = over_runs((decide(starts) * q(starts)).sum(1).numpy().astype(np.float64), cache).value
    assert fqe is not None
    real = [real_returns(spec, budget, FIRST_REAL_SEED + seed, args)[paid] for seed in range(args.seeds)]
    return {
        "budget": budget, "reward": paid, "policy": name, "fqe": fqe, "real": float(np.mean(real)),
        "real_std": float(np.std(real, ddof=1)) if len(real) > 1 else None, "error": fqe - float(np.mean(real)),
        "real_by_seed": real,
    }  # fmt: skip


def by_importance(rows: Sequence[dict[str, Any]], args: Args) -> list[dict[str, Any]]:
    """Weighted per-decision importance sampling without a budget, of policies that need no learning here."""
    root, found = args.root / "explored", []
    if not args.explored:
        return []
    settings = CollectArgs(horizon=args.steps, interval=args.interval, rule=args.rule)
    collect(args.workload, [f"explore:{spec}" for spec in names(args.explored)], args.drawn, UNLIMITED, root, settings)
    cache, run = build_cache(root), start_run(args.workload, 0, UNLIMITED, "hold", args.run)
    for row in rows:
        if row["budget"] == UNLIMITED and row["policy"] not in LEARNED:
            decide = decider_under_budget(policy_of(row["policy"]), cache, run)
            told = importance_sampling(decide, rescored(cache, REWARDS[row["reward"]]))
            found.append({
                "reward": row["reward"], "policy": row["policy"], "importance": told.value, "low": told.low, "high": told.high,
                "effective": told.effective, "fqe": row["fqe"], "real": row["real"], "note": told.note,
            })  # fmt: skip
    return found


def spearman(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """The rank correlation; nan where one side does not vary."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(ranks(left) @ ranks(right))


def correlated(known: NDArray[np.float64], real: NDArray[np.float64], draws: int = 1000) -> tuple[float, float, float]:
    """The rank correlation of estimates (P,) with the means of real returns (P, S); its 95 % interval over policies and seeds."""
    rng, found = np.random.default_rng(0), list[float]()
    for _ in range(draws):
        policies, seeds = rng.integers(len(known), size=len(known)), rng.integers(real.shape[1], size=real.shape[1])
        found.append(spearman(known[policies], real[policies][:, seeds].mean(1)))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return spearman(known, real.mean(1)), float(low), float(high)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per budget and reward: how well estimates rank the policies, and what taking the best estimated one would lose.

    `among_the_best`: the rank correlation among the better half of the policies, which are hard to tell apart. `agreement`:
    that of the two halves of the real seeds. `chosen_loses`: the best real return minus that of the policy with the best
    estimate; `random_loses`: minus the mean over policies.
    """
    found = []
    for key in dict.fromkeys((row["budget"], row["reward"]) for row in rows):
        here = [row for row in rows if (row["budget"], row["reward"]) == key]
        if len(here) < 3 or min(len(row["real_by_seed"]) for row in here) < 2:
            continue
        real, fqe = np.array([row["real_by_seed"] for row in here]), np.array([row["fqe"] for row in here])
        rho, low, high = correlated(fqe, real)
        means = real.mean(1)
        upper = np.argsort(-means)[: -(-len(here) // 2)]
        found.append({
            "budget": key[0], "reward": key[1], "policies": len(here), "seeds": real.shape[1], "spearman": rho, "low": low,
            "high": high, "among_the_best": spearman(fqe[upper], means[upper]),
            "agreement": spearman(real[:, ::2].mean(1), real[:, 1::2].mean(1)),
            "mean_absolute_error": float(np.abs(fqe - means).mean()), "bias": float((fqe - means).mean()),
            "spread_of_real": float(means.std()), "best": here[int(means.argmax())]["policy"],
            "chosen": here[int(fqe.argmax())]["policy"], "chosen_loses": float(means.max() - means[fqe.argmax()]),
            "random_loses": float(means.max() - means.mean()),
        })  # fmt: skip
    return found


def train(args: Args) -> Path:
    torch.set_num_threads(1)
    head, runs = stamp(args), earlier_runs(args.out)
    for budget in map(float, names(args.budgets)):
        recorded = record(args, budget)
        specs = [*(f"fixed:{rung}" for rung in fitting_rungs(args, budget, names(args.fixed))), *names(args.policies), *LEARNED]
        for paid, reward in REWARDS.items():
            cache = rescored(recorded, reward)
            for spec in specs:
                if find_run(runs, {"budget": budget, "reward": paid, "policy": spec}) is None:
                    runs.append(value(spec, budget, paid, cache, args) | {"commit": head["commit"]})
                    write(args.out, head | {"runs": runs})
                    print("{budget} {reward} {policy}: estimate {fqe:.3f}, real {real:.3f}".format(**runs[-1]), flush=True)
    policies = [{name: run[name] for name in SHOWN} for run in runs]
    importance = by_importance(runs, args)
    write(args.out, head | {"runs": runs, "policies": policies, "importance": importance, "summary": summary(runs)})
    for line in summary(runs):
        print(line)
    return args.out


if __name__ == "__main__":
    print(f"wrote {train(parse(Args, __doc__))}")
