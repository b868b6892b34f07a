"""Is a policy no more than a few questions? A decision tree distilled from its decisions, on workloads that it never saw.

    python -m experiments.distilled_tree --out benchmarks/results/distilled_tree.json     # a quarter of an hour on a core

The policy decides runs of several workloads, rules and budgets; trees of different depths learn its scores from them
(train_policy/tree.py) and are policies of their own. On workloads apart, each tree is asked what the policy is asked, and
then decides runs alone, paired by seed with the policy and with the same rule in full precision. `agrees`: the share of
layers with the policy's rung under the budget; `constant`: the same for one table of scores for all layers; `above`: held-out
loss above full precision's in per cent, being below it counts as 0. `trees` holds the trees, rules in words.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.record import parse, stamp, write
from experiments.transfer import names, possible
from mango.policy_file import FrozenPolicy, freeze
from mango_env.twin import twin_of
from train_policy.evaluate import EvaluationArgs, policy_of, start_run
from train_policy.evaluation_rows import percent_above
from train_policy.gate import bootstrap_interval
from train_policy.inspection import Probe, probe
from train_policy.provenance import about
from train_policy.tree import TreePolicy, distil_tree, fidelity, network_of, rules


@dataclass(frozen=True)
class Args:
    policy: str = "universal"
    learned: str = "mnist_vit+batch=16,shakespeare_lm+width=64+batch=8,books_words+batch=8,cifar10_cnn+batch=16"
    judged: str = "source_lm+batch=8,mnist_cnn+width=16+batch=16"        # workloads that no tree learns from
    rules: str = "adamw,muon"
    budgets: str = "0.0625,0.125"                       # of AdamW's state bytes
    depths: str = "4,8"                                 # questions on the way to a leaf, at most
    seeds: int = 2                                      # of the judged runs, from `seed` on; trees learn from others
    seed: int = 0
    steps: int = 160
    interval: int = 16
    matrix_lr_scale: float = 4.0                        # Muon's rate over AdamW's
    frozen: Path = Path("runs/universal_tree.safetensors")               # where the first tree is frozen
    out: Path = Path("benchmarks/results/distilled_tree.json")


def settings(workload: str, args: Args) -> Iterator[tuple[EvaluationArgs, float]]:
    """How runs of a workload are trained, and the budgets that it can have."""
    usual = EvaluationArgs(horizon=args.steps, interval=args.interval, schedule="cosine")
    for rule in names(args.rules):
        scale = args.matrix_lr_scale if rule == "muon" else 1.0
        for budget in map(float, names(args.budgets)):
            if possible(workload, rule, budget):
                yield replace(usual, rule=rule, matrix_lr_scale=scale), budget


def judge(decided: dict[str, Any], learned: list[Probe], workload: str, seed: int, args: Args) -> Iterator[dict[str, Any]]:
    """The policy, the first of `decided`, and the trees on one workload and seed."""
    for how, budget in settings(workload, args):
        full = twin_of(start_run(workload, seed, budget, "hold", how)).evaluation["val_loss"]
        runs = {name: probe(policy, workload, how, seed=seed, budget=budget) for name, policy in decided.items()}
        asked = next(iter(runs.values()))
        for name, run in runs.items():
            row = {"workload": workload, "seed": seed, "rule": how.rule, "budget": budget, "policy": name}
            row |= {"val_loss": run.val_loss, "gap_percent": percent_above(run.val_loss, full)}
            if run is not asked:
                same = fidelity(decided[name], learned, [asked])
                row |= {"decisions": same.decisions, "agrees": same.applied, "constant": same.applied_mean_scores}
            yield row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per policy: what is lost on average, against the first one, and how often it agrees with it."""
    by_run: dict[str, list[float]] = {}
    for row in rows:
        by_run.setdefault(row["policy"], []).append(max(row["gap_percent"], 0.0))
    asked, first = next(iter(by_run.items()))
    found = []
    for name, lost in by_run.items():
        more = [mine - its for mine, its in zip(lost, first, strict=True)]
        told: dict[str, Any] = {"policy": name, "runs": len(lost), "above": fmean(lost), "more": fmean(more)}
        if name != asked:
            told["more_low"], told["more_high"] = bootstrap_interval(more) if len(more) > 1 else (None, None)
            here = [row for row in rows if row["policy"] == name]
            told |= {key: fmean(row[key] for row in here) for key in ("agrees", "constant")}
        found.append(told)
    return found


def freeze_tree(tree: TreePolicy, policy: Any, learned: list[Probe], rows: list[dict[str, Any]], args: Args) -> Path:
    """A tree as a policy file, whose card says what it was distilled from and what it lost beside that."""
    card = {
        "description": f"A decision tree distilled from {args.policy}: its scores of a layer's rungs, in a few questions.",
        "licence": "MIT",
        "made": about("python -m experiments.distilled_tree"),
        "distilled_from": {"policy": args.policy} | distilled_from(policy),
        "trained_on": names(args.learned),
        "rules": rules(tree, learned),
        "evaluation": summary(rows)[:2],
    }
    observations = torch.cat([obs for run in learned for obs in run.observations])
    return freeze(network_of(tree, observations), args.frozen, card=card)


def distilled_from(policy: Any) -> dict[str, Any]:
    """The checksum and the training data of a frozen policy; nothing of a heuristic."""
    if not isinstance(policy, FrozenPolicy):
        return {}
    known = ("training_data_digest", "campaign_digest", "runs")
    return {"weights_sha256": policy.metadata["weights_sha256"]} | {key: policy.card[key] for key in known if key in policy.card}


def train(args: Args) -> Path:
    torch.set_num_threads(1)
    policy = policy_of(args.policy)
    learned = [
        probe(policy, workload, how, seed=args.seed + args.seeds, budget=budget)
        for workload in names(args.learned)
        for how, budget in settings(workload, args)
    ]
    trees = {f"tree of depth {depth}": distil_tree(learned, depth=int(depth)) for depth in names(args.depths)}
    told = {name: {"rules": rules(tree, learned), "nodes": tree.to_dict()} for name, tree in trees.items()}
    rows: list[dict[str, Any]] = []
    for workload in names(args.judged):
        for seed in range(args.seed, args.seed + args.seeds):
            rows += judge({args.policy: policy, **trees}, learned, workload, seed, args)
            write(args.out, stamp(args) | {"summary": summary(rows), "rows": rows, "trees": told})
    freeze_tree(next(iter(trees.values())), policy, learned, rows, args)
    for one in summary(rows):
        agrees = f", agrees in {one['agrees']:.0%} (one table for all layers {one['constant']:.0%})" if "agrees" in one else ""
        print(f"{one['policy']:18s} loses {one['above']:.2f} % in {one['runs']} runs{agrees}")
    return args.out


if __name__ == "__main__":
    print(f"wrote {train(parse(Args, __doc__))}")
