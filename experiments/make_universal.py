"""Makes the shipped policy `universal` from seeds: record, learn in stages, gate, freeze, evaluate where it never was.

    python -m experiments.make_universal --root runs/universal                 # hours on 2 cores
    python -m experiments.make_universal --root runs/universal --data trajectories/universal.h5  # what is recorded already
    python -m experiments.make_universal --root runs/universal --small         # a quarter of an hour, without any download

Every step goes on where it stopped. `<root>/data` has the trajectories, `<root>/*.safetensors` the stages, `<root>/gates.json`
what was decided between them, `<root>/transfer.json` the evaluation on held-out families (experiments/transfer.py), and
`<out>/universal.safetensors` with its card is the result. The gate compares losses on the training's families, seeds apart.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments import transfer
from mango.networks import PolicyNetwork
from mango.policy_file import freeze, load_policy
from mango_env.cache import TrajectoryCache, build_cache
from mango_env.reward import Reward
from mango_env.validate import validate
from mango_env.workloads import split_options
from train_policy import additive, bc, offline
from train_policy.batches import observations_of
from train_policy.cli_support import write_json
from train_policy.evaluate import evaluate
from train_policy.fitting import save_checkpoint
from train_policy.gate import decide
from train_policy.provenance import about
from trajectories.campaign import Campaign, read_campaign, run_campaign

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "trajectories" / "universal.yml"
NAME = "universal"
HEURISTIC = "water-filling"                              # what a learned policy has to beat
LOSS_ALONE = Reward(beta=0.0, gamma=0.0)                 # the budget is hard: what is left to decide is the loss
GATE_SEED = 1000                                         # the first seed of the gate; the campaign's are below


@dataclass(frozen=True)
class Scale:
    """How large each step is."""

    runs: int                                            # recorded
    updates: int                                         # of offline learning
    epochs: int                                          # of cloning
    timesteps: int                                       # of PPO
    gate_workloads: tuple[str, ...]
    gate_budgets: tuple[float, ...]
    gate_seeds: int
    changes: dict[str, Any]                              # of the campaign
    study: transfer.Args


FULL = Scale(
    runs=1400, updates=6000, epochs=40, timesteps=1024, gate_seeds=2, gate_budgets=(0.08, 0.125), changes={},
    gate_workloads=("mnist_vit+batch=64+lr=0.002", "source_lm+batch=8+lr=0.003"),
    study=transfer.Args(policies=f"{NAME},water-filling,sensitivity,error-constrained,bc,random,scheduled,adaptive", steps=160,
                        interval=16),
)  # fmt: skip
SMALL = Scale(
    runs=48, updates=1500, epochs=10, timesteps=512, gate_seeds=3, gate_budgets=(0.0625, 0.125),
    gate_workloads=("digits_mlp", "source_lm+width=32+batch=4"),
    changes={"families": {"digits_mlp": {"weight": 1}, "source_lm": {"weight": 2, "options": {"width": [32], "batch": [4]}}},
             "horizon": [60], "interval": [10]},
    study=transfer.Args(workloads="source_lm+width=48+depth=3+batch=4", policies=f"{NAME},water-filling", budgets="0.0625,0.125",
                        fixed="m0v0,m2v0,m4v0", seeds=2, steps=60, interval=10),
)  # fmt: skip


def record(scale: Scale, root: Path, workers: int, data: Path | None) -> tuple[Campaign, TrajectoryCache]:
    """The campaign's trajectories, checked; or those of a store or flat file that has them."""
    campaign = read_campaign(CONFIG, runs=scale.runs, **scale.changes)
    if data is not None:
        return campaign, build_cache(data, root / "cache")
    run_campaign(campaign, root / "data", workers=workers, progress=True)
    report = validate(root / "data")
    if not report.ok:
        raise ValueError(str(report))
    return campaign, build_cache(root / "data")


def stages(scale: Scale, root: Path, cache: TrajectoryCache) -> dict[str, Callable[[str], PolicyNetwork]]:
    """What to train, in order: a name, and how to get its network from the name of the stage that stands."""

    def clone(_: str) -> PolicyNetwork:
        return bc.train(PolicyNetwork("mlp"), cache, bc.BcArgs(epochs=scale.epochs), progress=True).network

    def regress(standing: str) -> PolicyNetwork:
        settings = offline.OfflineArgs(algo="additive", updates=4 * scale.updates, batch_size=512, learning_rate=3e-3)
        return learned(standing, settings)

    def improve(standing: str) -> PolicyNetwork:
        return learned(standing, offline.OfflineArgs(algo="iql", updates=scale.updates))

    def learned(standing: str, settings: offline.OfflineArgs) -> PolicyNetwork:
        start = load_policy(root / f"{standing}.safetensors").network
        return offline.train(start, cache, settings, progress=True).network

    return {"additive": regress, "bc": clone, "iql": improve, "ppo": lambda standing: tune(scale, root, standing)}


def tune(scale: Scale, root: Path, standing: str) -> PolicyNetwork:
    """PPO on live training runs of the gate's workloads, with seeds of its own."""
    from train_policy import ppo
    from train_policy.transfer import import_sb3

    import_sb3()
    from mango_env.layer_vec_env import LayerVecEnv

    env = LayerVecEnv(
        list(scale.gate_workloads), horizon=scale.study.steps // 2, interval=scale.study.interval, rule="muon", actions="rung",
        memory_budget=list(scale.gate_budgets), schedule=scale.study.schedule, reward=LOSS_ALONE, seeds=4, seed=0,
        optimizer_options={"matrix_lr_scale": scale.study.matrix_lr_scale},
    )  # fmt: skip
    rollout = max(64, scale.timesteps // 8)
    settings = ppo.PpoArgs(total_timesteps=scale.timesteps, rollout=rollout, batch_size=min(512, rollout), critic_warmup=rollout,
                           kl_anchor=0.1)  # fmt: skip
    try:
        return ppo.train(load_policy(root / f"{standing}.safetensors").network, env, settings, progress=True).network
    finally:
        env.close()


def score(scale: Scale, policy: Path | str, workers: int) -> dict[tuple[str, str, int, float], float]:
    """Minus the per cent of loss above full precision's, per run of the gate; being below it is no merit (it is luck)."""
    found: dict[tuple[str, str, int, float], float] = {}
    seeds = [GATE_SEED + i for i in range(scale.gate_seeds)]
    for rule in ("adamw", "muon"):
        for work in scale.gate_workloads:
            settings = transfer.settings_of(scale.study, rule)
            rows = evaluate(policy, work, list(scale.gate_budgets), seeds, settings, workers=workers)
            lost = [float("nan") if row.gap_full is None else max(row.gap_full, 0.0) for row in rows]
            found |= {(row.workload, rule, row.seed, float(row.budget)): -loss for row, loss in zip(rows, lost, strict=True)}
    return found


def learn(scale: Scale, root: Path, cache: TrajectoryCache, workers: int) -> tuple[str, list[dict[str, Any]]]:
    """Train the stages; each replaces the one that stands only where paired losses prove it better. Returns that, and why.

    The first has to be better than the heuristic. It is the one whose scores are costs, which mean something at every budget;
    what clones or bootstraps has to prove better than that.
    """
    standing, against, gates = "untrained", HEURISTIC, list[dict[str, Any]]()
    save_checkpoint(PolicyNetwork("mlp"), root / "untrained.safetensors", head="rung", card={"stage": "untrained"})
    scores = score(scale, HEURISTIC, workers)
    for name, work in stages(scale, root, cache).items():
        path = root / f"{name}.safetensors"
        if not path.exists():
            save_checkpoint(work(standing), path, head="rung", card={"stage": name, "training_data_digest": cache.digest})
        own = score(scale, path, workers)
        decision = decide(own, scores)
        gates.append({"policy": name, "against": against, **decision.to_dict()})
        print(f"gate: {name} against {against}: {decision.reason}", flush=True)
        if decision.accepted:
            standing, against, scores = name, name, own
    write_json(root / "gates.json", {"about": about(), "gates": gates, "standing": standing})
    return standing, gates


def make(scale: Scale, root: Path, out: Path, workers: int, minutes: float = 1e9, data: Path | None = None) -> Path:
    """All steps; returns the frozen policy. No run of the evaluation starts after so many minutes; called again it goes on.

    With `data`, a store or flat file of the campaign, nothing is recorded.
    """
    root.mkdir(parents=True, exist_ok=True)
    campaign, cache = record(scale, root, workers, data)
    standing, gates = learn(scale, root, cache, workers)
    steps, rules = (" or ".join(map(str, drawn)) for drawn in (campaign.horizon, campaign.rules))
    fitted = additive.fit(additive.outcomes_of(cache))
    card = {
        "description": "One rung per layer under a byte budget, for any model; scores are minus what a rung costs in final loss.",
        "licence": "MIT",
        "made": about("python -m experiments.make_universal"),
        "stage": standing,
        "trained_on": sorted({str(split_options(name)[0]) for name in campaign.families}),
        "training_data_digest": cache.digest,
        "campaign_digest": campaign.digest,
        "runs": len(set(cache.attributes["run_id"])),
        "explained_elsewhere": fitted.explained_elsewhere,
        "costs": additive.described(fitted.costs, observations_of(cache)),
        "gates": [{key: gate[key] for key in ("policy", "against", "accepted", "reason")} for gate in gates],
        "limits": f"Learned from runs of {steps} steps of models below half a million parameters, under {rules}.",
    }
    network = load_policy(root / f"{standing}.safetensors").network
    path = freeze(network, out / NAME, card=card)
    files = {NAME: path} | {stage: root / f"{stage}.safetensors" for stage in ("bc", "iql", "additive", "ppo")}
    specs = [str(files.get(name, name)) for name in scale.study.policies.split(",")]
    study = replace(scale.study, policies=",".join(specs), workers=workers, out=root / "transfer.json")
    transfer.train(replace(study, budget_minutes=minutes))
    return freeze(network, out / NAME, card=card | {"evaluation": evaluation_of(root / "transfer.json")})


def evaluation_of(study: Path) -> list[dict[str, Any]]:
    """The policy's rows of a transfer study's totals, as its card shows them."""
    rows: list[dict[str, Any]] = json.loads(study.read_text(encoding="utf-8"))["totals"]
    return [row for row in rows if row["policy"] == NAME]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of everything in between")
    parser.add_argument("--out", type=Path, default=ROOT / "policies", help="folder of the frozen policy; default: policies")
    parser.add_argument("--small", action="store_true", help="no download, a quarter of an hour")
    parser.add_argument("--data", type=Path, help="a store or flat file of the campaign; default: record it")
    parser.add_argument("--workers", type=int, default=2, help="processes; default 2")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no evaluation after so many; called again it goes on")
    args = parser.parse_args(arguments)
    path = make(SMALL if args.small else FULL, args.root, args.out, args.workers, args.minutes, args.data)
    print(f"{path}: {path.stat().st_size:,} bytes, stage {load_policy(path).card['stage']}")


if __name__ == "__main__":
    main()
