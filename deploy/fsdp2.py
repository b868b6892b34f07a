"""FSDP2: parameters, gradients and optimizer state in shards, each rank's state inside a budget of its own.

    torchrun --nproc-per-node 2 deploy/fsdp2.py --steps 100

Runs on CPUs (gloo) and GPUs (NCCL). Started again with the same `--folder` it goes on where it stopped, on any number of
processes: shards that lie elsewhere then are put together and encoded anew. Copy it and put your model and data in place.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mango import MANGO
from mango.distributed import checkpoint_state, load_checkpoint_state


@dataclass
class Args:
    """What the command line may change."""

    steps: int = 100                                         # optimizer steps of this run
    batch: int = 64                                          # sequences per step, over all ranks
    lr: float = 5e-3                                         # learning rate
    clip: float = 1.0                                        # largest l2 norm of the whole gradient
    fraction: float = 0.25                                   # of the state bytes that AdamW would take on a rank
    policy: str = "water-filling"                            # a shipped name, a path or a heuristic
    interval: int = 10                                       # steps between decisions
    folder: str = "runs/fsdp2"                               # of checkpoints and result.json


class Block(nn.Module):
    """A residual layer: the unit that is gathered and freed as one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


def network(width: int = 64, depth: int = 2, symbols: int = 32) -> nn.Module:
    """Predicts the next symbol from the one before: an embedding, blocks and a head, sharded over all ranks."""
    torch.manual_seed(0)                                     # before sharding, so that weights do not depend on the ranks
    model = nn.Sequential(nn.Embedding(symbols, width), *(Block(width) for _ in range(depth)), nn.Linear(width, symbols))
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for block in model:
        if isinstance(block, Block):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batches(args: Args, start: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of every step's batch: symbols (n,) and what follows them (n,), with noise."""
    for step in range(start, start + args.steps):
        generator = torch.Generator().manual_seed(step)      # named by the step: a resumed run sees what comes next
        x = torch.randint(32, (args.batch,), generator=generator)
        noise = torch.rand(args.batch, generator=generator) < 0.1
        y = torch.where(noise, torch.randint(32, (args.batch,), generator=generator), (5 * x + 3) % 32)
        yield x.chunk(world)[rank], y.chunk(world)[rank]


def train(args: Args) -> Path:
    """Train, and tell from every rank how many bytes of state it held at most."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world, folder = dist.get_rank(), dist.get_world_size(), Path(args.folder)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = network()
    # Built after `fully_shard`: the optimizer sees DTensors and keeps the state of this rank's shards alone.
    optimizer = MANGO(model.named_parameters(), lr=args.lr, policy=args.policy, policy_update_freq=args.interval,
                      memory_budget=args.fraction)  # fmt: skip
    saved = sorted(folder.glob("step-*"))
    if saved:
        weights = model.state_dict()
        load({"model": weights}, checkpoint_id=saved[-1])
        model.load_state_dict(weights)
        load_checkpoint_state(optimizer, saved[-1])
    losses, held = [], optimizer.state_bytes()
    for x, y in batches(args, optimizer.steps, rank, world):
        optimizer.zero_grad()
        loss: Tensor = F.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.clip_grad_norm(args.clip)                  # by the norm over all shards
        optimizer.observe_loss(loss)                         # each rank its own; decisions are made on the mean of all
        optimizer.step()
        losses.append(float(loss.detach()))
        held = max(held, optimizer.state_bytes())
    place = folder / f"step-{optimizer.steps:07d}"           # a folder of its own: a job killed here leaves the last one whole
    save({"model": model.state_dict(), "optimizer": checkpoint_state(optimizer)}, checkpoint_id=place)
    found = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(found, torch.tensor(held, device=device))
    path = folder / "result.json"
    if rank == 0:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        report = {"args": asdict(args), "versions": versions, "ranks": world,
                  "steps": optimizer.steps, "first_loss": losses[0], "loss": sum(losses[-5:]) / len(losses[-5:]),
                  "budget": optimizer.memory_budget, "state_bytes": [int(each) for each in found]}  # fmt: skip
        path.write_text(json.dumps(report, indent=1))
        print(f"step {report['steps']}: loss {report['loss']:.3f}; state bytes by rank {report['state_bytes']},"
              f" budget {report['budget']} each; {path}")  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    return path


def parse() -> Args:
    """The command line: one option per field of `Args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Args):
        kind: Any = field.type
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return Args(**vars(parser.parse_args()))


def main() -> None:
    train(parse())


if __name__ == "__main__":
    main()
