"""What each rung of the ladder costs: bytes, error of the update, loss at the end of training.

    python benchmarks/ladder.py --seeds 2 --out benchmarks/results/ladder.json

Every rung trains every workload from the same start over the same batches as torch's AdamW. The weights of the
water-filling policy were chosen so that its predicted errors order the rungs as these losses do.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.optim import AdamW, Optimizer

from benchmarks.record import stamp, write
from mango import LADDER, MANGO
from mango.state import StorageOptions, predicted_bytes
from mango_env.workloads import make_workload


@dataclass(frozen=True)
class Args:
    workloads: str = "digits_mlp,digits_cnn,source_lm"
    steps: int = 150                                    # optimizer steps per run
    seeds: int = 2                                      # runs per rung and workload
    lr: float = 2e-3                                    # the same for all
    threads: int = 1                                    # torch threads
    out: Path = Path("benchmarks/results/ladder.json")


def run(workload: str, seed: int, steps: int, build: Callable[[torch.nn.Module], Optimizer]) -> dict[str, float]:
    """Train once; the validation loss, and for MANGO the mean relative error of its layers and its bytes per parameter."""
    task = make_workload(workload, seed)
    optimizer = build(task.model)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss().backward()                          # type: ignore[no-untyped-call]
        optimizer.step()
    result = {"val_loss": task.evaluate()["val_loss"]}
    if isinstance(optimizer, MANGO):
        per_param = 8 * optimizer.state_bytes() / optimizer.adamw_bytes
        result |= {"error": float(optimizer.layer_errors().mean()), "bytes_per_param": per_param}
    return result


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    rows = []
    for workload in args.workloads.split(","):
        reference = [
            run(workload, seed, args.steps, lambda model: AdamW(model.parameters(), lr=args.lr, weight_decay=0))["val_loss"]
            for seed in range(args.seeds)
        ]
        print(f"\n{workload}: AdamW {mean(reference):.4f}")
        for rung in LADDER:

            def build(model: torch.nn.Module, policy: object = rung) -> Optimizer:
                return MANGO(model.named_parameters(), lr=args.lr, policy=policy, policy_update_freq=25)

            runs = [run(workload, seed, args.steps, build) for seed in range(args.seeds)]
            gaps = [100 * (r["val_loss"] / ref - 1) for r, ref in zip(runs, reference, strict=True)]
            row = {
                "workload": workload,
                "rung": rung.name,
                "matrix_512_bytes_per_param": predicted_bytes((512, 512), rung, StorageOptions()) / 512**2,
                "bytes_per_param": mean(r["bytes_per_param"] for r in runs),
                "error": mean(r["error"] for r in runs),
                "val_loss": [r["val_loss"] for r in runs],
                "gap_percent": mean(gaps),
                "gap_sd": stdev(gaps) if len(gaps) > 1 else None,
            }
            bytes_text = f"{row['matrix_512_bytes_per_param']:7.3f} B/param"
            print(f"{rung.name:10s} {bytes_text}  error {row['error']:.3f}  gap {row['gap_percent']:+7.2f} %")
            rows.append(row)
    return write(args.out, stamp(args) | {"rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Args):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    path = train(Args(**vars(parser.parse_args())))
    print(f"\n{len(json.loads(path.read_text())['rows'])} rows in {path}")


if __name__ == "__main__":
    main()
