"""What the rungs cost in final loss, by rule, rate and half of the run, according to a campaign of designed experiments.

    python -m experiments.rung_costs --out benchmarks/results/rung_costs.json      # or --data of another campaign

Fits `train_policy/additive.py` to the store and prints the mean effect of each rung, had the whole model it for that half, over
layers that trained at the lower and at the higher half of the rates. The unit is the standard deviation of final losses between
the allocations tried, in each workload and rule (listed below, in per cent). Below 0 the loss is lower than full precision's.
`explained` is the share of the variance between allocations that is predicted in families that were left out: near 0, the
choice of rungs does not decide the loss of these runs.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import parse, stamp, write
from mango.config import LADDER
from mango_env.cache import build_cache
from train_policy import additive
from train_policy.batches import observations_of


@dataclass(frozen=True)
class Args:
    data: Path = Path("trajectories/universal.h5")       # a store or flat file with final losses and twins
    out: Path = Path("runs/rung_costs.json")


def train(args: Args) -> Path:
    cache = build_cache(args.data)
    data = additive.outcomes_of(cache)
    fitted = additive.fit(data)
    obs = observations_of(cache)
    rate = additive.circumstances(obs)[:, 2]
    halves = {"lower": rate < rate.median(), "higher": rate >= rate.median()}
    rows = [{"rates": name} | row for name, here in halves.items() for row in additive.described(fitted.costs, obs[here])]
    counts = Counter(data.setting)
    settings: list[dict[str, Any]] = [
        {"workload": workload, "rule": rule, "runs": counts[workload, rule], "spread_percent": spread}
        for (workload, rule), spread in sorted(additive.spread_of(data).items())
    ]
    print(f"{len(data)} runs, twins included; explained in families left out: {fitted.explained_elsewhere:.2f}")
    shown = [name for name in LADDER.names if name.startswith(("m0", "r", "m2", "m4", "m6", "m8")) and name.endswith("v0")]
    print(f"{'rates':8s} {'rule':8s} {'half':8s} " + " ".join(f"{name:>9s}" for name in shown))
    for row in rows:
        print(f"{row['rates']:8s} {row['rule']:8s} {row['half']:8s} " + " ".join(f"{row[name]:+9.2f}" for name in shown))
    for one in settings:
        print("{workload:44s} {rule:6s} {runs:3d} runs, allocations differ by {spread_percent:.2f} %".format(**one))
    found = {"runs": len(data), "digest": cache.digest, "explained_elsewhere": fitted.explained_elsewhere}
    chosen = {"size": fitted.costs.size, "shrinkage": fitted.shrinkage}
    return write(args.out, stamp(args) | found | chosen | {"costs": rows, "settings": settings})


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
