"""What docs/theory.md claims, measured: contraction constants, convergence, feedback, low rank, variance.

    python -m experiments.theory --out benchmarks/results/theory.json

  contraction          share of the squared norm that each format loses, on made-up and real gradients and on a block made to be
                       bad, beside what `mango.bounds` declares
  run                  the same for every tensor that a real run stores, under a random config every few steps
  convergence          (H1) SGD with rate c / sqrt(T) on a noisy quadratic: least and mean squared gradient norm against T
  feedback             (H3) the residual's largest norm over the gradients' largest, beside Karimireddy et al. (2019), lemma 3
  low_rank             (D9) error of rank r with b-bit factors on real gradients over 1 / r + 2^-b
  variance_reduction   (D8) squared error of what MARINA applies over that of coding without it

About five minutes on one core. `--only` runs some of these.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from torch import Generator, Tensor
from torch.nn import Parameter

from benchmarks.record import parse, stamp, write
from experiments.bf16_master import bound as interval
from mango import MANGO, CompressionConfig
from mango.bounds import Rounding, contraction_bound, feedback_bound
from mango.codecs import Codec, Encoded, encode, safe
from mango.feedback import Compress, error_feedback
from mango.formats import SIGNED, UNSIGNED, gradient_codec
from mango.lowrank import find, matricise, project, unproject
from mango.policies import random_action
from mango_env.run import TrainingRun
from mango_env.workloads import make_workload

Row = dict[str, Any]
CODED: dict[str, tuple[int, float]] = {                  # gradient bits and sparsity of the compressors that feedback is tried on
    "g8": (8, 0.0), "g6": (6, 0.0), "g4": (4, 0.0), "g2": (2, 0.0), "s0.5": (32, 0.5), "s0.9": (32, 0.9), "s0.99": (32, 0.99),
    "g4s0.9": (4, 0.9),
}  # fmt: skip
DIMENSIONS, CURVATURES = 256, (0.1, 1.0)                 # of the quadratic; a matrix of 16 x 16 where a rank is asked for


@dataclass(frozen=True)
class Args:
    only: str = ""                                       # sections, comma-separated; all where empty
    seed: int = 0                                        # of data, runs and noise
    horizon: int = 100_000                               # steps of the longest quadratic
    rows: int = 4                                        # independent quadratics per horizon
    noise: float = 0.3                                   # standard deviation of each entry's gradient noise there
    rate: float = 1.0                                    # c of the rate c / sqrt(T)
    threads: int = 1                                     # torch threads
    out: Path = Path("benchmarks/results/theory.json")


def samples(shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Made-up gradients whose rows are independent."""
    chance = Generator().manual_seed(seed)

    def normal(size: tuple[int, ...] = shape) -> Tensor:
        return torch.randn(size, generator=chance)

    chi = normal((3, *shape)).square().mean(0)
    kept = torch.rand(shape, generator=chance) < 0.05
    return {
        "normal": normal(), "student_t3": normal() / chi.sqrt(), "log_normal": normal().sign() * (2 * normal()).exp(),
        "sparse": normal() * kept,
    }  # fmt: skip


def real_gradients(seed: int, steps: Sequence[int], workload: str = "source_lm") -> Iterator[dict[str, Tensor]]:
    """The matrices' gradients at some steps of a run in full precision, by name."""
    run = make_workload(workload, seed)
    params = {name: p for name, p in run.model.named_parameters() if p.dim() > 1}
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=getattr(run, "lr", 2e-3))
    for step in range(max(steps) + 1):
        optimizer.zero_grad()
        run.loss().backward()  # type: ignore[no-untyped-call]
        if step in steps:
            yield {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
        optimizer.step()


def shares(codec: Codec, x: Tensor, key: int | None = None) -> Tensor:
    """What is lost of each row's squared norm: (rows,), rows of zeros left out."""
    lost, norm = (encode(codec, x, key).decode() - x).double().square().sum(1), x.double().square().sum(1)
    return (lost / norm)[norm > 0]


def bad_block(codec: Codec, chance: bool) -> float:
    """The largest share lost (by chance: on average) of blocks with one entry of 1 and equal others, tiny ones or none."""
    values = torch.cat([torch.logspace(-6, -2, 100), torch.linspace(0.01, 1, 1000)])
    found = []
    for first, sign in ((0.0, 1), (0.0, -1), (1e-8, 1)):
        block = values[:, None].repeat(1, getattr(codec, "block", 64))
        block[:, -1] = 1.0
        block[:, 0] = torch.where(torch.tensor(first > 0), first, block[:, 0])
        if sign < 0 and codec in UNSIGNED.values():
            continue
        if not chance:
            found.append(float(shares(codec, sign * block).max()))
            continue
        worst = torch.stack([shares(codec, sign * block, key) for key in range(8)]).mean(0).argmax()
        again = (sign * block[worst]).expand(512, -1)                              # drawn anew: the largest of means is biased
        found.append(float(shares(codec, again, 99).mean()))
    return max(found)


def contraction(args: Args) -> list[Row]:
    rows: list[Row] = []
    layers = [g for found in real_gradients(args.seed, (0, 10, 40)) for g in found.values()]
    data = samples((256, 256), args.seed)
    data["source_lm"] = torch.cat([g.flatten()[: g.numel() // 256 * 256].view(-1, 256) for g in layers])
    formats = [("gradient", codec, key) for key in (None, 1) for codec in SIGNED.values()]
    formats += [("second moment", codec, 1) for codec in UNSIGNED.values() if codec.name != "factored"]
    for what, codec, key in formats:
        rounding: Rounding = "nearest" if key is None else "mean"
        row: Row = {"what": what, "format": codec.name, "rounding": rounding, "bad_block": bad_block(codec, key is not None)}
        row["bound"] = contraction_bound(codec, (256,), rounding)
        rows.append(row | {n: spread(shares(codec, x.square() if what[0] == "s" else x, key).tolist()) for n, x in data.items()})
    tensors = {name: layers if name == "source_lm" else [x] for name, x in (data | samples((64, 64), args.seed)).items()}
    for bits, sparsity in ((32, 0.5), (32, 0.9), (32, 0.99), (4, 0.9), (2, 0.99)):
        codec = gradient_codec(bits, sparsity)
        row = {"what": "gradient", "format": f"{codec.name} {sparsity:g}", "rounding": "nearest"}
        row |= {"bound": contraction_bound(codec, (64, 64)), "bad_block": float(shares(codec, torch.ones(1, 4096)))}
        rows.append(row | {name: spread([float(shares(codec, x.reshape(1, -1))) for x in xs]) for name, xs in tensors.items()})
    for rank in (1, 4, 8, 32):
        row = {"what": "gradient", "format": f"rank {rank}", "rounding": "mean", "bound": 1 - rank / 64}
        row["bad_block"] = outside(torch.eye(64), rank)
        rows.append(row | {name: spread([outside(x, rank) for x in xs if min(x.shape) == 64]) for name, xs in tensors.items()})
    return rows


def spread(values: Sequence[float]) -> Row:
    return {"mean": mean(values), "worst": max(values)}


def outside(x: Tensor, rank: int) -> float:
    """What is lost of the squared norm outside the subspace that `lowrank.find` finds, mean over three starts."""
    matrix = matricise(x)
    bases = [find(matrix, rank, Generator().manual_seed(seed)) for seed in range(3)]
    return mean(float((matrix - unproject(p, project(p, matrix))).square().sum() / matrix.square().sum()) for p in bases)


@contextmanager
def watched() -> Iterator[dict[tuple[str, str], list[float]]]:
    """Everything that the optimizer encodes meanwhile: (codec, rounding) to shares of what is declared.

    Without its fused kernels, which store the same bits and show nothing of it.
    """
    found: dict[tuple[str, str], list[float]] = {}

    def measured(codec: Codec, x: Tensor, key: int | None = None) -> Encoded:
        stored, norm = encode(codec, x, key), float(x.double().square().sum())
        declared = contraction_bound(codec, tuple(x.shape), "nearest" if key is None else "any")
        if norm > 0 and declared > 0:
            lost = float((stored.decode().double() - x.double()).square().sum()) / norm
            found.setdefault((codec.name, "nearest" if key is None else "any"), []).append(lost / declared)
        return stored

    with mock.patch("mango.state.encode", measured), mock.patch.object(MANGO, "_fusable", return_value=False):
        yield found


def run_bounds(args: Args, workload: str = "source_lm", steps: int = 30) -> list[Row]:
    """Per format, the largest share that a stored tensor lost, of what is declared."""
    rows = []
    for mode in (True, False, "marina"):
        run = TrainingRun(workload, args.seed, horizon=steps, interval=3, memory_budget=4.0,
                          optimizer_options={"error_feedback": mode})  # fmt: skip
        chance = Generator().manual_seed(args.seed)
        with watched() as found:
            while not run.done:
                run.apply(random_action(len(run.layers), chance))
                run.advance()
        rows += [{"mode": str(mode), "format": codec, "rounding": rounding, "tensors": len(of), "worst_of_bound": max(of)}
                 for (codec, rounding), of in sorted(found.items())]  # fmt: skip
    return rows


class WarmRank:
    """PowerSGD's compressor on rows that are matrices (B, 16 * 16): one power iteration from the last projector."""

    def __init__(self, rank: int) -> None:
        self.rank, self.projector = rank, torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[-1])
        matrix = x.view(-1, side, side)
        first = torch.eye(side)[:, : self.rank].expand(len(matrix), -1, -1)
        start = self.projector[: len(matrix)] if self.projector.numel() else first
        unit = matrix / safe(matrix.abs().amax((1, 2)))[:, None, None]
        self.projector = torch.linalg.qr(unit @ (unit.mT @ start) + 1e-6 * start).Q
        return (self.projector @ (self.projector.mT @ matrix)).view(x.shape)


def by_codec(bits: int, sparsity: float = 0.0) -> Compress:
    codec = gradient_codec(bits, sparsity)
    return lambda x: encode(codec, x).decode()


def top_rows(sparsity: float) -> Compress:
    """What the sparse codec keeps of every row, for many rows at once."""

    def compress(x: Tensor) -> Tensor:
        places = x.abs().topk(x.shape[1] - round(x.shape[1] * sparsity), 1).indices
        return torch.zeros_like(x).scatter_(1, places, x.gather(1, places))

    return compress


def convergence(args: Args) -> Row:
    """min and mean over t <= T of |grad f(x_t)|^2 for every horizon T, and their slopes against T in log-log."""
    horizons = [round(10 ** (k / 2)) for k in range(4, 11) if round(10 ** (k / 2)) <= args.horizon][::-1]
    chance, rows = Generator().manual_seed(args.seed), len(horizons) * args.rows
    curvature = torch.logspace(math.log10(CURVATURES[0]), math.log10(CURVATURES[1]), DIMENSIONS)
    ends = torch.tensor(horizons).repeat_interleave(args.rows)                     # (rows,) longest first
    rate = (args.rate / ends.sqrt())[:, None]
    methods: dict[str, Compress] = {
        "uncompressed": torch.clone, "4 bits": by_codec(4), "2 bits": by_codec(2), "sparsity 0.99": top_rows(0.99),
        "rank 4": WarmRank(4), "sparsity 0.99, no feedback": top_rows(0.99),
    }  # fmt: skip
    x = {name: torch.ones(rows, DIMENSIONS) for name in methods}
    owed = {name: torch.zeros(rows, DIMENSIONS) for name in methods}
    least, total = ({name: torch.full((rows,), start) for name in methods} for start in (math.inf, 0.0))
    for t in range(horizons[0]):
        now = args.rows * sum(end > t for end in horizons)
        noise = args.noise * torch.randn(now, DIMENSIONS, generator=chance)
        for name, compress in methods.items():
            true = curvature * x[name][:now]
            square = true.square().sum(1)
            least[name][:now] = torch.minimum(least[name][:now], square)
            total[name][:now] += square
            debt = torch.zeros_like(noise) if name.endswith("no feedback") else owed[name][:now]
            applied, owed[name] = error_feedback(true + noise, debt, compress)
            x[name][:now] -= rate[:now] * applied
    found: Row = {"horizons": horizons, "dimensions": DIMENSIONS, "methods": []}
    for name in methods:
        row: Row = {"method": name}
        for what, values in (("min", least[name]), ("mean", total[name] / ends)):
            logs = values.view(len(horizons), args.rows).double().log10()
            row[what] = (10 ** logs.mean(1)).tolist()
            row[f"slope_{what}"] = slope(horizons, logs)
            row[f"slope_{what}_from_1000"] = slope([end for end in horizons if end >= 1000], logs)
        found["methods"].append(row)
    return found


def slope(horizons: Sequence[int], logs: Tensor) -> Row:
    """Least squares of log10 values (H, rows) over the longest horizons' log10: mean over rows, and half its 95 % interval."""
    clock = torch.tensor(horizons).double().log10()
    clock = clock - clock.mean()
    slopes = (clock @ logs[: len(horizons)] / clock.square().sum().clamp(min=1e-9)).tolist()
    return {"mean": mean(slopes), "half_ci95": interval(slopes, len(slopes), math.nan)}


def residual_ratio(compress: Compress, stream: Sequence[Tensor], residual_bits: int = 32) -> tuple[float, float]:
    """The residual's largest norm over the gradients' largest, and the largest share of a squared norm that was lost."""
    owed, largest, owing, lost = torch.zeros_like(stream[0]), 0.0, 0.0, 0.0
    for step, grad in enumerate(stream):
        wanted = grad + owed
        _, owed = error_feedback(grad, owed, compress)
        lost = max(lost, float(owed.square().sum() / wanted.square().sum().clamp(min=1e-30)))
        if residual_bits < 32:
            owed = encode(SIGNED[residual_bits], owed, step).decode()
        largest, owing = max(largest, float(grad.norm())), max(owing, float(owed.norm()))
    return owing / largest, lost


def feedback(args: Args, steps: int = 300) -> list[Row]:
    chance = Generator().manual_seed(args.seed)
    once = torch.randn(1, 4096, generator=chance)
    streams = {
        "normal": [torch.randn(1, 4096, generator=chance) for _ in range(steps)],
        "the same": [once] * steps,
        "student_t3": [samples((1, 4096), seed)["student_t3"] for seed in range(steps)],
        "source_lm": [found["blocks.1.attn.out_proj.weight"].view(1, -1) for found in real_gradients(args.seed, range(60))],
    }
    rows = []
    for name, coded in [*CODED.items(), ("rank 4 of 64, warm", None)]:
        found = {kept: {of: residual_ratio(by_codec(*coded) if coded else WarmRank(4), stream, kept)
                        for of, stream in streams.items()} for kept in (32, 8)}  # fmt: skip
        lost = max(lost for each in found.values() for _, lost in each.values())
        declared = contraction_bound(gradient_codec(*coded), (4096,)) if coded else lost
        row: Row = {"compressor": name, "contraction": declared, "lost": lost, "lemma": feedback_bound(declared)}
        for kept, each in found.items():
            row[f"residual_{kept}"] = {of: ratio for of, (ratio, _) in each.items()}
            row[f"worst_{kept}"] = max(ratio for ratio, _ in each.values())
        rows.append(row | {"holds": row["worst_32"] <= row["lemma"], "of_lemma": row["worst_32"] / row["lemma"]})
    return rows


def low_rank(args: Args) -> Row:
    rows: list[Row] = []
    steps, ranks = (0, 20, 100), (1, 4, 8, 16, 32)
    layers = {f"{name}, step {step}": g for step, found in zip(steps, real_gradients(args.seed, steps), strict=True)
              for name, g in found.items()} | {"noise": samples((64, 64), 0)["normal"]}  # fmt: skip
    for name, gradient in layers.items():
        matrix = matricise(gradient)
        for rank in ranks:
            p = find(matrix, rank, Generator().manual_seed(args.seed))
            for bits in (16, 8, 4):
                stored = [encode(SIGNED[bits], factor).decode() for factor in (p, project(p, matrix))]
                lost = float((matrix - unproject(*stored)).square().sum() / matrix.square().sum())
                form = 1 / rank + 2.0**-bits
                rows.append({"layer": name, "rank": rank, "bits": bits, "lost": lost, "form": form, "ratio": lost / form})
    real, noise = ([row for row in rows if (row["layer"] == "noise") == made] for made in (False, True))
    return {
        "c": max(row["ratio"] for row in real), "worst": max(real, key=lambda row: float(row["ratio"])),
        "c_least_squares": sum(row["lost"] * row["form"] for row in real) / sum(row["form"] ** 2 for row in real),
        "ratio_by_rank": {rank: spread([row["ratio"] for row in real if row["rank"] == rank]) for rank in ranks},
        "c_of_noise": max(row["ratio"] for row in noise), "rows": rows,
    }  # fmt: skip


def variance_reduction(args: Args, seeds: int = 5, steps: int = 60) -> list[Row]:
    """Gradient descent on least squares, gradients of 4 bits by chance, exact every 10 steps: ratios of squared errors."""
    rows = []
    for batch in (100, 50, 10):                                                    # of 100 examples
        ratios = []
        for seed in range(args.seed, args.seed + seeds):
            chance = Generator().manual_seed(seed)
            a, b = torch.randn(100, 50, generator=chance), torch.randn(100, 40, generator=chance)
            drawn = [torch.randperm(100, generator=chance)[:batch] for _ in range(steps)]
            squared = {}
            for mode in ("marina", False):
                param = Parameter(torch.zeros(50, 40))
                optimizer = MANGO([param], lr=0.1, rule="sgd", momentum=0.0, policy=CompressionConfig(gradient_bits=4),
                                  memory_budget="1MiB", error_feedback=mode, seed=seed, residual_bits=32)  # fmt: skip
                squared[mode] = 0.0
                for rows_of in drawn:
                    true = a[rows_of].T @ (a[rows_of] @ param.detach() - b[rows_of]) / batch
                    param.grad = true.clone()
                    optimizer.steps += 1
                    work = optimizer.compress_gradients()
                    squared[mode] += float((work[0].gradient - true).square().sum())
                    optimizer.update_parameters(work)
            ratios.append(squared["marina"] / squared[False])
        rows.append({"batch": batch, "of": 100, "ratios": ratios, "mean": mean(ratios), "below_without": max(ratios) < 1})
    return rows


SECTIONS: dict[str, Callable[[Args], Any]] = {
    "contraction": contraction, "run": run_bounds, "convergence": convergence, "feedback": feedback, "low_rank": low_rank,
    "variance_reduction": variance_reduction,
}  # fmt: skip


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    result: Row = {"kind": "theory", "about": stamp(args), "seconds": {}}
    for name in args.only.split(",") if args.only else SECTIONS:
        began = time.perf_counter()
        result[name] = SECTIONS[name](args)
        result["seconds"][name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {result['seconds'][name]} s", flush=True)
    return write(args.out, result)


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
