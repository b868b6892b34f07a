"""Do critical gradients and momenta help where one can look? Two small classifications, and two functions of many minima.

    python -m experiments.critical_toys --out benchmarks/results/critical_toys.json

Classification: scikit-learn's moons and circles, a small network, minibatches. Every optimizer is tried at torch's rate and at
a tenth of it; both are printed, and the one of the lower validation loss is measured on test points, paired by seed with its
vanilla optimizer, which chooses its rate in the same way. Exploration: Goldstein-Price and Ackley from 100 starts, Adam against
Adam_CM from the same ones: how many come near the global minimum, how many end there, how low, and how far they travelled.
Every start is a tensor with a memory of its own. Intervals of means are bootstrapped over pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from benchmarks.record import parse, stamp, write
from mango.critical import SGD_C, Adam_C, Adam_CM, AdamW_C, RMSprop_C
from train_policy.gate import bootstrap_interval

PAIRS: dict[str, tuple[type[Optimizer], type[Optimizer], float]] = {       # with memory, without, and the higher rate
    "SGD_C": (SGD_C, SGD, 0.1),
    "RMSprop_C": (RMSprop_C, RMSprop, 0.01),
    "Adam_C": (Adam_C, Adam, 0.01),
    "AdamW_C": (AdamW_C, AdamW, 0.01),
    "Adam_CM": (Adam_CM, Adam, 0.01),
}


@dataclass(frozen=True)
class Args:
    seeds: int = 5                                      # of data, network and minibatches
    steps: int = 400                                    # of a classification
    batch: int = 32
    starts: int = 100                                   # of a minimisation, uniform in the function's usual domain
    descent: int = 500                                  # steps of a minimisation
    rates: str = "0.1,0.01"                             # of a minimisation
    threads: int = 1                                    # torch threads
    out: Path = Path("benchmarks/results/critical_toys.json")


def points(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """1,000 points and their classes: a quarter to train on, a quarter to choose by, half to test on."""
    from sklearn.datasets import make_circles, make_moons

    x, y = (make_moons(1000, noise=0.2, random_state=seed) if name == "moons"
            else make_circles(1000, noise=0.1, factor=0.6, random_state=seed))  # fmt: skip
    return torch.from_numpy(x).float(), torch.from_numpy(y).long()


def classify(name: str, kind: Callable[..., Optimizer], lr: float, seed: int, args: Args) -> dict[str, float]:
    """One training: loss on the validation points, loss and accuracy on the test points."""
    x, y = points(name, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = kind(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        batch = torch.randint(250, (args.batch,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        out = model(x)
        right = (out[500:].argmax(1) == y[500:]).float().mean()
        return {"validation_loss": cross_entropy(out[250:500], y[250:500]).item(),
                "test_loss": cross_entropy(out[500:], y[500:]).item(), "test_accuracy": right.item()}  # fmt: skip


def classification(args: Args) -> list[dict[str, Any]]:
    """A row per data set and optimizer: losses at both rates, the better rate, and the paired gap to vanilla."""
    rows, done = [], dict[tuple[str, str, float], list[dict[str, float]]]()

    def runs(data: str, kind: Callable[..., Optimizer], name: str, lr: float) -> list[dict[str, float]]:
        if (data, name, lr) not in done:
            done[data, name, lr] = [classify(data, kind, lr, seed, args) for seed in range(args.seeds)]
        return done[data, name, lr]

    for data in ("moons", "circles"):
        for name, (kind, vanilla, lr) in PAIRS.items():
            found = {}
            for told, one in ((name, kind), (vanilla.__name__, vanilla)):
                tried = {rate: runs(data, one, told, rate) for rate in (lr, lr / 10)}
                losses = {rate: mean(r["validation_loss"] for r in results) for rate, results in tried.items()}
                better = min(losses, key=losses.__getitem__)
                found[told] = better, tried[better]
                at = ", ".join(f"lr {rate:g} {loss:.4f}" for rate, loss in losses.items())
                print(f"{data:8s} {told:10s} validation loss: {at}; better: lr {better:g}", flush=True)
            (rate, mine), (other, theirs) = found.values()
            gaps = [a["test_loss"] - b["test_loss"] for a, b in zip(mine, theirs, strict=True)]
            low, high = bootstrap_interval(gaps)
            rows.append({"data": data, "optimizer": name, "lr": rate, "vanilla": vanilla.__name__, "vanilla_lr": other,
                         "test_loss": mean(r["test_loss"] for r in mine), "gap": mean(gaps), "gap_low": low, "gap_high": high,
                         "accuracy": mean(r["test_accuracy"] for r in mine),
                         "vanilla_accuracy": mean(r["test_accuracy"] for r in theirs),
                         "verdict": "better" if high < 0 else "worse" if low > 0 else "tie"})  # fmt: skip
    return rows


def goldstein_price(at: Tensor) -> Tensor:
    """Values at (N, 2); the global minimum is 3 at (0, -1) (Goldstein & Price 1971).

    >>> goldstein_price(torch.tensor([[0.0, -1.0]])).item()
    3.0
    """
    x, y = at.unbind(-1)
    one = 1 + (x + y + 1) ** 2 * (19 - 14 * x + 3 * x**2 - 14 * y + 6 * x * y + 3 * y**2)
    return one * (30 + (2 * x - 3 * y) ** 2 * (18 - 32 * x + 12 * x**2 + 48 * y - 36 * x * y + 27 * y**2))


def ackley(at: Tensor) -> Tensor:
    """Values at (N, 2); the global minimum is 0 at the origin (Ackley 1987).

    >>> abs(ackley(torch.zeros(1, 2)).item()) < 1e-5
    True
    """
    near = (at.square().sum(-1) / 2 + 1e-16).sqrt()                        # differentiable at the origin
    return 20 - 20 * torch.exp(-0.2 * near) + math.e - torch.exp(torch.cos(2 * math.pi * at).mean(-1))


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, tuple[float, float]]] = {  # half a side of the domain, minimum
    "goldstein_price": (goldstein_price, 2.0, (0.0, -1.0)),
    "ackley": (ackley, 5.0, (0.0, 0.0)),
}
CLOSE = 0.25                                            # from the global minimum: nearer to it than to any other minimum


def descend(name: str, kind: Callable[..., Optimizer], lr: float, args: Args) -> dict[str, Tensor]:
    """From all starts at once, each (starts,): end values, who came near the global minimum, who ended there, the way gone."""
    function, half, minimum = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    start = (2 * torch.rand(args.starts, 2, generator=generator, dtype=torch.float64) - 1) * half
    params = [Parameter(point.clone()) for point in start]
    optimizer = kind(params, lr=lr)
    place = torch.tensor(minimum, dtype=torch.float64)
    travelled, before, nearest = torch.zeros(args.starts, dtype=torch.float64), start, (start - place).norm(dim=1)
    for _ in range(args.descent):
        at = torch.stack([p.detach() for p in params]).requires_grad_()
        (grads,) = torch.autograd.grad(function(at).sum(), at)
        for param, grad in zip(params, grads.unbind(), strict=True):
            param.grad = grad
        optimizer.step()
        now = torch.stack([p.detach() for p in params])
        travelled += (now - before).norm(dim=1)
        before, away = now, (now - place).norm(dim=1)
        nearest = torch.minimum(nearest, away)
    return {"value": function(before), "visited": (nearest < CLOSE).double(), "ended": (away < CLOSE).double(),
            "travelled": travelled}  # fmt: skip


def exploration(args: Args) -> list[dict[str, Any]]:
    """A row per function, rate and decay of Adam_CM: shares of starts, with intervals of the paired difference."""
    rows = []
    for name in FUNCTIONS:
        for lr in map(float, args.rates.split(",")):
            plain = descend(name, Adam, lr, args)
            for decay in (0.7, 0.99):

                def remembering(params: list[Parameter], lr: float, decay: float = decay) -> Optimizer:
                    return Adam_CM(params, lr=lr, decay=decay, synced=False)

                mine = descend(name, remembering, lr, args)
                told: dict[str, Any] = {"function": name, "lr": lr, "decay": decay, "starts": args.starts}
                for what in ("visited", "ended"):
                    low, high = bootstrap_interval((mine[what] - plain[what]).tolist())
                    told |= {f"adam_{what}": plain[what].mean().item(), f"adam_cm_{what}": mine[what].mean().item(),
                             f"{what}_gap_interval": [low, high]}  # fmt: skip
                told |= {"adam_median_value": plain["value"].median().item(),
                         "adam_cm_median_value": mine["value"].median().item(),
                         "travelled_ratio": (mine["travelled"].mean() / plain["travelled"].mean()).item()}  # fmt: skip
                rows.append(told)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    head = stamp(args)
    return write(args.out, head | {"classification": classification(args), "exploration": exploration(args)})


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
