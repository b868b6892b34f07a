"""FSDP2: parameters, gradients and optimizer state in shards, each rank's state inside a budget of its own.

    torchrun --nproc-per-node 2 -m deploy.fsdp2 --steps 100

Runs on CPUs (gloo) and GPUs (NCCL). Started again with the same `--folder` it goes on where it stopped, on any number of
processes: shards that lie elsewhere then are put together and encoded anew. Copy it and
`ddp.py`, of which it takes checkpoints and report, and put your model and data in place.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from deploy.ddp import everywhere, finish, keep, parse, resume, start
from mango import MANGO


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
    (rank, world, device), folder = start(), Path(args.folder)
    model = network()
    # Built after `fully_shard`: the optimizer sees DTensors and keeps the state of this rank's shards alone.
    optimizer = MANGO(model.named_parameters(), lr=args.lr, policy=args.policy, policy_update_freq=args.interval,
                      memory_budget=args.fraction)  # fmt: skip
    resume(model, optimizer, folder)
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
    keep(model, optimizer, folder)
    report = {"args": asdict(args), "ranks": world, "steps": optimizer.steps, "budget": optimizer.memory_budget,
              "state_bytes": everywhere(held, world, device)}  # fmt: skip
    return finish(folder, report, losses, rank)


def main() -> None:
    train(parse(Args, __doc__))


if __name__ == "__main__":
    main()
