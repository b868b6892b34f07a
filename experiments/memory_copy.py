"""Memory at a lag: symbols shown, then nothing for a long time, then asked for one by one, of trunks of equal size.

    python -m experiments.memory_copy --networks tinyformer --rates 0.003 --seeds 1,2,3
    python -m experiments.memory_copy --networks lstm --rates 0.001,0.003,0.01 --seeds 1,2,3

The copying task (Hochreiter & Schmidhuber 1997, sec. 5; Arjovsky et al. 2016, sec. 5.1) through the observation and the rung
head of a `PolicyNetwork`: the first `shown` steps show one of eight symbols each, `lag` steps later the same symbols are to
be named, and the steps between show nothing. Networks of one seed get the same batches and as many updates; of several
learning rates the one with the best mean accuracy on sequences never trained on counts, so nobody is judged at a rate that
does not suit. Seed 0 is the one that TinyFormer's rate and initialisation were chosen on. Runs are appended to the results
file one by one and never repeated.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from mango.features import FEATURE_DIM, FEATURES
from mango.networks import PolicyNetwork

SYMBOLS = 8                                             # an answer by chance is right one time in eight
NETWORKS: dict[str, dict[str, Any]] = {                 # at most 1 % apart in parameters, the LSTM has more
    "tinyformer": {"architecture": "tinyformer"},
    "lstm": {"architecture": "lstm", "hidden_dim": 120, "num_layers": 1},
}


@dataclass(frozen=True)
class Args:
    lag: int = 100                                      # decisions from a symbol to its answer
    shown: int = 10                                     # symbols per sequence
    batch: int = 8                                      # sequences
    updates: int = 120                                  # of Adam
    rates: str = "0.001,0.003,0.01"                     # learning rates
    seeds: str = "1,2,3"                                # one run each per network and rate
    networks: str = "tinyformer,lstm"                   # names in NETWORKS
    held_out: int = 128                                 # sequences
    out: Path = Path("benchmarks/results/memory_copy.json")


def sequences(count: int, lag: int, shown: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Observations (count, lag + shown, 64) and symbols (count, shown).

    Feature i < 8 is at the top of its range where symbol i is shown, feature 8 in the last `shown` steps, when they are asked
    for; everything else is in the middle of its range. So an unfitted normaliser sees ones and zeros.
    """
    symbols = torch.randint(SYMBOLS, (count, shown), generator=generator)
    marks = torch.zeros(count, lag + shown, FEATURE_DIM)
    marks[:, :shown].scatter_(2, symbols.unsqueeze(2), 1.0)
    marks[:, lag:, SYMBOLS] = 1.0
    low, high = (torch.tensor([getattr(feature, side) for feature in FEATURES]) for side in ("low", "high"))
    return (low + high) / 2 + marks * (high - low) / 2, symbols


def run(network: dict[str, Any], args: Args, rate: float, seed: int) -> dict[str, Any]:
    """One network, trained and asked about sequences that it never saw: its accuracy, parameters and curve."""
    net = PolicyNetwork(**network, rungs=SYMBOLS, seed=seed)
    drawn = Generator().manual_seed(10_000 + seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    began, curve = time.perf_counter(), []
    for _ in range(args.updates):
        observations, symbols = sequences(args.batch, args.lag, args.shown, drawn)
        loss = cross_entropy(net(observations).rung_logits[:, -args.shown :].flatten(0, 1), symbols.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        curve.append(round(float(loss.detach()), 4))
    seconds = time.perf_counter() - began
    observations, symbols = sequences(args.held_out, args.lag, args.shown, Generator().manual_seed(20_000 + seed))
    with torch.no_grad():
        right = net(observations).rung_logits[:, -args.shown :].argmax(2) == symbols
    return {
        "accuracy": float(right.float().mean()),
        "parameters": sum(p.numel() for p in net.parameters()),
        "seconds": round(seconds, 1),
        "loss": curve[:: max(1, args.updates // 20)],
    }


def best(runs: list[dict[str, Any]], args: Args) -> dict[str, dict[str, Any]]:
    """By network: the rate with the best mean accuracy over the seeds, and the accuracy of each seed at it."""
    found: dict[str, dict[str, Any]] = {}
    for run_ in runs:
        if all(run_[fact] == getattr(args, fact) for fact in ("lag", "shown", "batch", "updates")):
            rates = found.setdefault(run_["network"], {}).setdefault("rates", {})
            rates.setdefault(run_["rate"], []).append(run_["accuracy"])
    for one in found.values():
        one["rate"] = max(one["rates"], key=lambda rate: sum(one["rates"][rate]) / len(one["rates"][rate]))
        one["accuracy"] = one["rates"].pop(one["rate"])
        one["other_rates"] = one.pop("rates")
    return found


def main() -> None:
    args = parse(Args, __doc__)
    runs = earlier_runs(args.out)
    for seed in map(int, args.seeds.split(",")):
        for name in args.networks.split(","):
            for rate in map(float, args.rates.split(",")):
                facts = {"network": name, "rate": rate, "seed": seed} | {
                    fact: getattr(args, fact) for fact in ("lag", "shown", "batch", "updates")
                }
                done = find_run(runs, facts)
                if done is None:
                    head = stamp(args)
                    done = facts | run(NETWORKS[name], args, rate, seed) | {"by": head}
                    runs.append(done)
                    write(args.out, head | {"runs": runs})
                print(f"{name:<12} rate {rate:<6g} seed {seed}: accuracy {done['accuracy']:.3f}", flush=True)
    print(json.dumps(best(runs, args), indent=1))


if __name__ == "__main__":
    main()
