"""DistributedDataParallel: the optimizer's state whole on every rank, or shared among them, and gradients that travel encoded.

    torchrun --nproc-per-node 2 deploy/ddp.py --steps 100
    torchrun --nproc-per-node 2 deploy/ddp.py --no-shard --gradient-bits 8

Runs on CPUs (gloo) and GPUs (NCCL). Started again with the same `--folder` it goes on where it stopped, on any number of
processes; without `torchrun` it is one. Copy it and put your model and data in place of `network` and `batches`.
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

from mango import MANGO
from mango.distributed import EncodedGradients, checkpoint_state, encoded_gradient_hook, load_checkpoint_state


@dataclass
class Args:
    """What the command line may change."""

    steps: int = 100                                         # optimizer steps of this run
    batch: int = 64                                          # points per step, over all ranks
    lr: float = 5e-3                                         # learning rate
    memory_budget: str = "0.25"                              # bytes of state per rank: a fraction of AdamW's, "6GiB" or bytes
    policy: str = "water-filling"                            # a shipped name, a path or a heuristic
    interval: int = 10                                       # steps between decisions
    shard: bool = True                                       # each layer's state on one rank; otherwise all of it on each
    gradient_bits: int = 32                                  # of gradients on their way between ranks: 32, 16, 8, 4 or 2
    folder: str = "runs/ddp"                                 # of checkpoints and result.json


def network(width: int = 64) -> nn.Module:
    """Equal on all ranks: DDP sends the first rank's weights to the others."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), *hidden, nn.Linear(width, 3))


def batches(args: Args, start: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of every step's batch: points (n, 2) and which third of the plane they turn in (n,)."""
    for step in range(start, start + args.steps):
        generator = torch.Generator().manual_seed(step)      # named by the step: a resumed run sees what comes next
        x = torch.randn(args.batch, 2, generator=generator)
        turn = torch.atan2(x[:, 1], x[:, 0]) + 2 * x.norm(dim=1)
        yield x.chunk(world)[rank], (turn * 3 / (2 * torch.pi)).floor().long().remainder(3).chunk(world)[rank]


def start() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, with torch.distributed under way if `torchrun` started it."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cpu")
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def train(args: Args) -> Path:
    """Train, and tell from every rank how many bytes of state it held at most."""
    rank, world, device = start()
    folder = Path(args.folder)
    model = network().to(device)
    ddp: Any = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    travelled = None
    if world > 1 and args.gradient_bits < 32:
        travelled = EncodedGradients(args.gradient_bits, error_feedback=True)
        ddp.register_comm_hook(travelled, encoded_gradient_hook)
    optimizer = MANGO(ddp.named_parameters(), lr=args.lr, policy=args.policy, policy_update_freq=args.interval,
                      memory_budget=budget(args.memory_budget), shard=args.shard and world > 1)  # fmt: skip
    resume(model, optimizer, folder)
    losses, held = [], optimizer.state_bytes()
    for x, y in batches(args, optimizer.steps, rank, world):
        optimizer.zero_grad()
        loss: Tensor = F.cross_entropy(ddp(x.to(device)), y.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.observe_loss(loss)                         # each rank its own; decisions are made on the mean of all
        optimizer.step()
        losses.append(float(loss.detach()))
        held = max(held, optimizer.state_bytes())
    keep(model, optimizer, folder)
    sent = None if travelled is None else [travelled.sent_bytes, travelled.plain_bytes]
    report = {"args": asdict(args), "ranks": world, "steps": optimizer.steps, "budget": optimizer.memory_budget,
              "state_bytes": everywhere(held, world, device), "sent_bytes": sent}  # fmt: skip
    return finish(folder, report, losses, rank)


def budget(text: str) -> float | int | str:
    """A fraction, a number of bytes, or a size with its unit."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text


def resume(model: nn.Module, optimizer: MANGO, folder: Path) -> None:
    """Go on from the folder's last checkpoint, if it has one; any number of ranks may have written it."""
    saved = sorted(folder.glob("step-*"))
    if saved:
        weights = model.state_dict()
        load({"model": weights}, checkpoint_id=saved[-1])
        model.load_state_dict(weights)
        load_checkpoint_state(optimizer, saved[-1])


def keep(model: nn.Module, optimizer: MANGO, folder: Path) -> None:
    """Write a checkpoint, each into a folder of its own: a job killed here leaves the last one whole."""
    place = folder / f"step-{optimizer.steps:07d}"
    save({"model": model.state_dict(), "optimizer": checkpoint_state(optimizer)}, checkpoint_id=place)


def everywhere(number: int, world: int, device: torch.device) -> list[int]:
    """The number as each rank has it."""
    if world == 1:
        return [number]
    found = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(found, torch.tensor(number, device=device))
    return [int(each) for each in found]


def finish(folder: Path, report: dict[str, Any], losses: list[float], rank: int) -> Path:
    """Write the report, once, and part."""
    path = folder / "result.json"
    report["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__}
    report |= {"first_loss": losses[0], "loss": sum(losses[-5:]) / len(losses[-5:])}
    if rank == 0:
        path.write_text(json.dumps(report, indent=1))
        print(f"step {report['steps']}: loss {report['loss']:.3f}; state bytes by rank {report['state_bytes']},"
              f" budget {report['budget']} each; {path}")  # fmt: skip
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return path


def parse(kind: Any, description: str | None) -> Any:
    """The command line as a dataclass: one option per field."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(kind):
        how: Any = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **how)
    return kind(**vars(parser.parse_args()))


def main() -> None:
    train(parse(Args, __doc__))


if __name__ == "__main__":
    main()
