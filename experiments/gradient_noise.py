"""Two statements about gradients in training, measured: the noise scale that policies see, and phases of training.

    python -m experiments.gradient_noise --out benchmarks/results/gradient_noise.json

  noise_scale   (B13) the feature tr(Sigma) / |G|^2 on gradients whose value is known, and on a real run against the gradients of
                many batches at fixed parameters: of the feature while these stay, of the feature while training goes on, and of
                1 / cosine - 1, the cosine being that of successive gradients (another feature)
  thirds        (B14) "high variance early, stable directions in the middle, selective late": variance, directions and
                concentration of gradients per third of a run, and whether the claimed third is beyond both others

Both runs are AdamW in full precision at a constant rate. About five minutes on one core.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Generator
from torch.nn import Parameter

from benchmarks.record import parse, stamp, write
from experiments.bf16_master import bound as interval
from mango import MANGO
from mango.features import FEATURE_INDEX, FEATURES
from mango_env.run import TrainingRun
from mango_env.workloads import make_workload

Row = dict[str, Any]
NOISE_SCALE = FEATURE_INDEX["noise_scale"]
LARGEST = FEATURES[NOISE_SCALE].high                     # log10, where no |G|^2 above zero was found


@dataclass(frozen=True)
class Args:
    seeds: int = 3                                       # runs of each workload, two at least
    seed: int = 0                                        # of the first
    batches: int = 200                                   # of the estimate at fixed parameters
    steps: int = 0                                       # of the runs in thirds; 0: the workload's own
    threads: int = 1                                     # torch threads
    out: Path = Path("benchmarks/results/gradient_noise.json")


def known_noise_scale(scale: float, window: int, seed: int, windows: int = 20) -> list[float]:
    """The feature over the true tr(Sigma) / |G|^2 of gradients G + noise, at the end of each window of steps."""
    chance, param = Generator().manual_seed(seed), Parameter(torch.zeros(256, 256))
    signal = torch.randn(256, 256, generator=chance)
    deviation = math.sqrt(scale * float(signal.square().mean()))
    optimizer, found = MANGO([param], lr=0.0, policy="hold", policy_update_freq=window, min_numel=1, memory_budget=2.0), []
    for _ in range(windows):
        for _ in range(window):
            param.grad = signal + deviation * torch.randn(256, 256, generator=chance)
            optimizer.step()
        found.append(10 ** float(optimizer.observe()[0, NOISE_SCALE]) / scale)
    return sorted(found)


def at_fixed_parameters(run: TrainingRun, seed: int, batches: int) -> tuple[list[float], list[float]]:
    """Per layer tr(Sigma) / |G|^2 at the run's parameters, from all entries of many batches' gradients, and the feature's."""
    fresh = make_workload(str(run.spec), seed)
    fresh.model.load_state_dict(run.model.state_dict())
    params = dict(fresh.model.named_parameters())
    still = MANGO(params.items(), lr=0.0, policy="hold", policy_update_freq=batches, memory_budget=2.0)
    sums, squares = [torch.zeros(layer.shape) for layer in run.layers], [0.0] * len(run.layers)
    for _ in range(batches):
        still.zero_grad()
        fresh.loss().backward()  # type: ignore[no-untyped-call]
        for i, layer in enumerate(run.layers):
            grad = params[layer.name].grad
            assert grad is not None
            sums[i] += grad
            squares[i] += float(grad.square().sum())
        still.step()
    middle = [float((total / batches).square().sum()) for total in sums]
    trace = [(square - batches * centre) / (batches - 1) for square, centre in zip(squares, middle, strict=True)]
    true = [t / (centre - t / batches) for t, centre in zip(trace, middle, strict=True)]  # unbiased in both parts
    return true, (10 ** still.observe()[:, NOISE_SCALE].double()).tolist()


def noise_scale(args: Args) -> Row:
    known, rows, largest = [], [], []
    for window in (10, 100):
        for scale in (0.1, 1.0, 10.0, 100.0):
            found = known_noise_scale(scale, window, args.seed)
            within = mean(abs(ratio - 1) <= 0.1 for ratio in found)
            known.append({"window": window, "true": scale, "median_ratio": median(found), "least": found[0], "largest": found[-1],
                          "windows_within_10_percent": within})  # fmt: skip
    for seed in range(args.seed, args.seed + args.seeds):
        run = TrainingRun("source_lm", seed, horizon=100, memory_budget=2.0)
        while not run.done:
            run.advance()
            seen = run.observe()
            largest.append(float((seen[:, NOISE_SCALE] >= LARGEST).mean()))
            if run.t % 50:
                continue
            cosine = seen[:, FEATURE_INDEX["grad_cosine"]].clip(1e-10)                # |G|^2 / (|G|^2 + tr(Sigma)) where G stays
            true, still = at_fixed_parameters(run, 1_000 + seed, args.batches)
            for i, layer in enumerate(run.layers):
                rows.append({"seed": seed, "step": run.t, "layer": layer.name, "many_batches": true[i], "feature_still": still[i],
                             "feature": 10 ** float(seen[i, NOISE_SCALE]), "from_cosine": float(1 / cosine[i] - 1)})  # fmt: skip
    compared = {name: agreement(rows, name) for name in ("feature_still", "feature", "from_cosine")}
    return {"known": known, "at_its_largest": mean(largest), "source_lm": compared, "rows": rows}


def agreement(rows: Sequence[Row], name: str) -> Row:
    """An estimate against that of many batches: how often at its largest, off by what factor, and Spearman's correlation."""
    logs = torch.tensor([(row[name], row["many_batches"]) for row in rows]).double().clamp(min=1e-10).log()
    off, order = (logs[:, 0] - logs[:, 1]).abs(), logs.argsort(0).argsort(0).double()
    return {"layers": len(rows), "at_its_largest": sum(row[name] >= 0.99 * 10**LARGEST for row in rows),
            "spearman": float(torch.corrcoef(order.T)[0, 1]), "median_factor_off": float(off.median().exp()),
            "worst_factor_off": float(off.max().exp())}  # fmt: skip


CLAIMS = {                                               # feature: the third where it should be extreme, and the sign of that
    "grad_variance": (0, 1), "grad_cosine": (1, 1), "momentum_alignment": (1, 1), "stable_rank": (2, -1), "grad_crest": (2, 1),
}  # fmt: skip


def thirds(args: Args) -> list[Row]:
    """Per feature its mean over layers in each third, and how far the third of the claim is beyond the nearer of the others."""
    rows = []
    for workload in ("source_lm", "digits_cnn"):
        runs = []
        for seed in range(args.seed, args.seed + args.seeds):
            run, seen = TrainingRun(workload, seed, horizon=args.steps or None, memory_budget=2.0), []
            while not run.done:
                run.advance()
                seen.append(torch.from_numpy(run.observe()).double().mean(0)[[FEATURE_INDEX[name] for name in CLAIMS]])
            runs.append(torch.stack([part.mean(0) for part in torch.stack(seen).tensor_split(3)]))
        for i, (name, (where, sign)) in enumerate(CLAIMS.items()):
            values = torch.stack(runs)[:, :, i]                                    # (seeds, 3)
            gaps = [(sign * (values[:, where] - values[:, other])).tolist() for other in range(3) if other != where]
            beyond = min(gaps, key=mean)
            half = interval(beyond, len(beyond), math.nan)
            verdict = "yes" if mean(beyond) > half else "no" if mean(beyond) < -half else "not shown"
            spreads = [interval(values[:, k].tolist(), len(values), math.nan) for k in range(3)]
            rows.append({"workload": workload, "steps": run.t, "feature": name, "third": where + 1,
                         "claim": "most" if sign > 0 else "least", "thirds": values.mean(0).tolist(), "half_ci95": spreads,
                         "beyond": mean(beyond), "beyond_half_ci95": half, "holds": verdict})  # fmt: skip
    return rows


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    about = stamp(args)
    return write(args.out, {"kind": "gradient_noise", "about": about, "noise_scale": noise_scale(args), "thirds": thirds(args)})


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
