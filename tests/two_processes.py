"""Two processes that run functions for the tests of distributed training, over gloo on the CPU, and a job to run there."""

import io
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mango import MANGO
from mango.distributed import checkpoint_state, load_checkpoint_state

WORLD = 2
BATCH = 8
PATIENCE = 300.0                                             # seconds that a slow machine gets for one job


class TwoProcesses:
    """`run(f, ...)` calls f(rank, ...) in both processes at once and gives back what both returned."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder, self._jobs = folder, []
        self._processes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "rendezvous"), theirs), daemon=True)
            process.start()
            self._jobs.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._jobs:
            pipe.send((job, args))
        answers = []
        for rank, pipe in enumerate(self._jobs):
            assert pipe.poll(PATIENCE), f"rank {rank} gave no answer within {PATIENCE:.0f} s"
            fine, answer = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            answers.append((fine, answer))
        broken = [f"rank {rank}:\n{answer}" for rank, (fine, answer) in enumerate(answers) if not fine]
        assert not broken, "\n".join(broken)
        return [answer for _, answer in answers]

    def __enter__(self) -> "TwoProcesses":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pipe in self._jobs:
            pipe.close()                                     # ends the loop in `_serve`
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank: int, rendezvous: str, jobs: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        try:
            job, args = jobs.recv()
        except EOFError:
            break
        try:
            answer = True, job(rank, *args)
        except Exception:  # noqa: BLE001 - the test reports it
            answer = False, traceback.format_exc()
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        jobs.send_bytes(buffer.getvalue())
    dist.destroy_process_group()


def network() -> nn.Sequential:
    """Four layers of much the same size, one of which does not divide by two, and their biases."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 48), nn.Tanh(), nn.Linear(48, 32)
        )


def build(mode: str, options: dict[str, Any]) -> tuple[nn.Module, MANGO]:
    """`mode`: "alone", "ddp", "sharded" (DDP, state by layers) or "fsdp2"."""
    model: nn.Module = network()
    if mode == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    elif mode != "alone":
        model = nn.parallel.DistributedDataParallel(model)
    options = {"lr": 1e-3, "memory_budget": 3.0, "policy_update_freq": 4, "total_steps": 40} | options
    return model, MANGO(model.named_parameters(), shard=mode == "sharded", **options)


def batch(step: int, rank: int, world: int) -> Tensor:
    """This rank's part of the step's batch."""
    return torch.randn(BATCH, 32, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]


def whole(tensor: Any) -> Tensor:
    """The tensor, put together where it is sharded."""
    dense: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return dense.detach().clone()


def train(
    rank: int, mode: str, options: dict[str, Any], steps: range, resume: str | None = None, save: str | None = None,
    clip: float = 0.0,
) -> dict[str, Any]:
    """Train on the steps' batches; tells what every rank should agree on and what is its own."""
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save as store

    model, optimizer = build(mode, options)
    inner: Any = model.module if hasattr(model, "module") else model
    if resume is not None:
        weights = inner.state_dict()
        load({"model": weights}, checkpoint_id=resume)
        inner.load_state_dict(weights)
        load_checkpoint_state(optimizer, resume)
    seen: list[Tensor] = []
    optimizer.register_decision_hook(lambda decision: seen.append(decision.observation))
    peak, applied, norms = optimizer.state_bytes(), [], []
    for step in steps:
        optimizer.zero_grad()
        x = batch(step, rank, 1 if mode == "alone" else WORLD)
        loss = (model(x) - x.square()).square().mean()
        loss.backward()
        optimizer.observe_loss(loss)
        if clip:
            norms.append(float(optimizer.clip_grad_norm(clip)))
        optimizer.step()
        peak = max(peak, optimizer.state_bytes())
        applied.append([config.name for config in optimizer.applied])
    if save is not None:
        store({"model": inner.state_dict(), "optimizer": checkpoint_state(optimizer)}, checkpoint_id=save)
    return {
        "params": [whole(p) for p in inner.parameters()], "applied": applied, "seen": seen, "peak": peak, "norms": norms,
        "budget": optimizer.memory_budget, "bytes": optimizer.state_bytes(), "planned": optimizer.planned_bytes(),
        "tensors": {k: v.clone() for k, v in checkpoint_state(optimizer).items() if not k.endswith("#")},
        "skipped": optimizer.skipped, "steps": optimizer.steps,
    }  # fmt: skip
