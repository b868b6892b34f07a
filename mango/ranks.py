"""One optimizer on several ranks: who keeps which state, what they agree on, and what travels after a step.

Three ways to share a model. Replicated (DistributedDataParallel): every rank keeps the same state. Layer-sharded
(`shard=True`): each tensor's state lives on one rank, which moves the parameter and sends it to the others (ZeRO stage 1,
Rajbhandari et al. 2020, by whole layers). DTensors (FSDP2): every rank keeps the state of its own shards.

In all of them a decision is one: statistics are merged, each layer's row is taken from the rank that answers for it, and
so is its config. The budget is per rank and holds on each.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mango.codecs import Shape
from mango.config import KNOBS, CompressionConfig
from mango.loss_track import LossTrack
from mango.state import Target
from mango.statistics import NORMS, GradientStatistics

BUCKET = 1 << 25                                             # bytes of parameters that travel in one message


class Ranks:
    """The ranks of one optimizer. Alone (no process group) nothing is sent, and every tensor is here."""

    def __init__(self, group: "dist.ProcessGroup | None", device: torch.device, shard: bool = False) -> None:
        self.group, self.device, self.shard = group, device, shard
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.targets: list[Target] = []
        self._owners: dict[Tensor, int] = {}                 # under `shard`

    @classmethod
    def of(cls, params: Sequence[Tensor], process_group: Any, shard: Any) -> "Ranks":
        """The ranks that train these parameters together.

        `process_group`: the group; False: this process is on its own; None: the mesh of the DTensors, or all processes of
        torch.distributed where it is initialised. `shard` may name the group too.

        Raises:
            ValueError: `shard` without torch.distributed, or of DTensors, which are sharded already.
        """
        device = params[0].device if params else torch.device("cpu")
        started = dist.is_available() and dist.is_initialized()
        meshes = [mesh for param in params if (mesh := getattr(param, "device_mesh", None)) is not None]
        if shard and (process_group is False or not started):
            raise ValueError("shard needs a process group: call torch.distributed.init_process_group first")
        if shard and meshes:
            raise ValueError("shard=True is for parameters that every rank has whole; DTensors (FSDP2) are sharded already")
        if not started or process_group is False:
            return cls(None, device)
        group = process_group if shard in (True, False) else shard
        if group in (None, True):
            group = meshes[0].get_group() if meshes and meshes[0].ndim == 1 else dist.group.WORLD
        return cls(group if group.size() > 1 else None, device, bool(shard))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        twin = Ranks(self.group, self.device, self.shard)    # a process group is not copied
        twin.targets, twin._owners = copy.deepcopy((self.targets, self._owners), memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"group": None, "size": 1, "rank": 0}

    # -- who keeps what

    def place(self, targets: list[Target], released: bool = False) -> None:
        """Say of every target whether its state is here, and of which shape its largest part on any rank is.

        Under `shard` the largest tensor goes to the rank with the fewest entries so far: the same on all ranks. A tensor
        that has an owner keeps it.

        Raises:
            ValueError: gradients released during backward (before they are averaged over ranks), Muon on shards.
        """
        if released and self.group is not None:
            raise ValueError("release_gradients=True takes gradients before they are averaged over ranks; leave it out, or"
                             " give process_group=False where this process trains on its own")  # fmt: skip
        self.targets = targets
        if self.shard and self.group is not None:
            self._assign()
        for target in targets:
            target.sharded = hasattr(target.param, "device_mesh")
            target.planned = largest_shard(target.param) if target.sharded else tuple(target.param.shape)
            target.mine = not target.sharded or target.local.numel() > 0
            if target.rule.startswith("muon") and target.planned != tuple(target.param.shape):
                raise ValueError(f"{target.name} is sharded, and Muon needs whole matrices; take DDP with shard=True, or AdamW")
            if self._owner(target) not in (None, self.rank):
                target.planned, target.mine = None, False

    def _assign(self) -> None:
        load = [0] * self.size
        for target in sorted(self.targets, key=lambda t: (t.param not in self._owners, -t.param.numel())):
            owner = self._owners.setdefault(target.param, load.index(min(load)))
            load[owner] += target.param.numel()

    def _owner(self, target: Target) -> int | None:
        """The rank that keeps the tensor's state; None where each keeps its own."""
        return self._owners.get(target.param)

    def largest_numel(self) -> int:
        """Entries whose state the fullest rank keeps: what a budget as a fraction refers to."""
        load = [0] * self.size
        for target in self.targets:
            owner = self._owner(target)
            for rank in range(self.size) if owner is None else [owner]:
                load[rank] += target.param.numel() if owner is not None else math.prod(target.planned or ())
        return max(load)

    def _answers(self) -> Tensor:
        """(L,) the rank that answers for each layer: its owner, or the first."""
        return torch.tensor([self._owner(t) or 0 for t in self.targets if t.layer is not None], dtype=torch.int64)

    def _weights(self) -> Tensor:
        """(L,) float64: entries of each layer that this rank's statistics speak for."""
        members = [t for t in self.targets if t.layer is not None]
        here = [t.local.numel() if t.sharded else t.param.numel() * (self.rank == (self._owner(t) or 0)) for t in members]
        return torch.tensor(here, dtype=torch.float64)

    # -- what is agreed on

    def sum(self, table: Tensor) -> Tensor:
        """The sum over ranks of a small table: float64, on the CPU."""
        if self.group is None:
            return table
        wire = table.double().to(self.device, copy=True)
        dist.all_reduce(wire, group=self.group)
        return wire.cpu()

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        if self.group is None:
            return number
        wire = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(wire, op=dist.ReduceOp.MIN, group=self.group)
        return int(wire)

    def all(self, flag: bool) -> bool:
        """Whether it is so on every rank."""
        return bool(self.least(int(flag)))

    def average(self, losses: LossTrack, step: int, interval: int) -> None:
        """Ranks see different batches: where an interval of steps ends, have them all see its mean loss and its last two."""
        ends = (step + 1) % interval <= 1
        if self.group is None or not ends:
            return
        known = [0.0, 0.0] if losses.now is None else [float(losses.now), 1.0]
        mine = [*known, float(losses.total), float(losses.count)]
        now, here, total, count = self.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        losses.now = now / here if here else None
        if step % interval == 0:
            losses.total, losses.count = total, int(count)

    def merge(self, statistics: GradientStatistics) -> Tensor | None:
        """The statistics' summary (L, C) of all ranks together: means weighted by entries, and norms over all of them.

        Rows of layers that live on another rank are put into the statistics here, where nothing else fills them.
        """
        if self.group is None or not statistics.layers:
            return None
        own, weights = statistics.summary(), self._weights()[:, None]               # (L, C), (L, 1)
        norms = (weights > 0) * own[:, :NORMS].square()
        sums = self.sum(torch.cat([weights, norms, weights * own[:, NORMS:]], 1))
        total = sums[:, :1]
        members = [t for t in self.targets if t.layer is not None]
        entries = torch.tensor([[float(t.param.numel())] for t in members], dtype=torch.float64)
        merged = torch.cat([(sums[:, 1 : NORMS + 1] * entries / total).sqrt(), sums[:, NORMS + 1 :] / total], 1)
        statistics.take_over([i for i, t in enumerate(members) if t.planned is None], merged)
        return merged

    def rows(self, table: Tensor) -> Tensor:
        """(L, ...) each layer's row as the rank has it that answers for the layer."""
        if self.group is None or not len(table):
            return table
        kept = torch.where((self._answers() == self.rank)[:, None], table.double(), 0.0)
        return self.sum(kept).to(table.dtype)

    def agree(self, configs: list[CompressionConfig]) -> list[CompressionConfig]:
        """One config per layer: that of the rank that answers for the layer."""
        if self.group is None or not configs:
            return configs
        table = torch.tensor([[float(getattr(c, knob)) for knob in KNOBS] for c in configs], dtype=torch.float64)
        agreed: list[list[float]] = self.rows(table).tolist()
        return [CompressionConfig.from_dict(dict(zip(KNOBS, row, strict=True))) for row in agreed]

    # -- what travels

    @torch.no_grad()
    def share(self) -> None:
        """Under `shard`: every owner sends the parameters that it moved."""
        if self.group is None or not self.shard:
            return
        sent = []
        for owner, params in self._buckets():
            if owner == self.rank:
                flat = torch.cat([param.detach().reshape(-1) for param in params])
            else:
                flat = torch.empty(sum(param.numel() for param in params), dtype=params[0].dtype, device=params[0].device)
            source = dist.get_global_rank(self.group, owner)
            sent.append((owner, params, flat, dist.broadcast(flat, source, group=self.group, async_op=True)))
        for owner, params, flat, work in sent:
            if work is not None:
                work.wait()
            if owner != self.rank:
                for param, part in zip(params, torch.split(flat, [param.numel() for param in params]), strict=True):
                    param.detach().copy_(part.view(param.shape))

    def _buckets(self) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, parameters of one dtype on one device), the same on all ranks."""
        filling: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        for param, owner in self._owners.items():
            if not param.requires_grad or not param.numel():
                continue
            key = (owner, param.dtype, param.device)
            bucket = filling.setdefault(key, [])
            bucket.append(param)
            if sum(p.numel() * p.element_size() for p in bucket) >= BUCKET:
                yield owner, filling.pop(key)
        for (owner, _, _), bucket in filling.items():
            yield owner, bucket


    # -- state dicts

    def speaks(self, target: Target) -> bool:
        """Whether it is this rank that saves what is here of the tensor."""
        if not target.sharded:
            return self.rank == (self._owner(target) or 0)
        mesh, placements = target.param.device_mesh, target.param.placements  # type: ignore[attr-defined]
        place = mesh.get_coordinate() or ()
        return target.mine and all(at == 0 for at, placement in zip(place, placements, strict=True) if placement.is_replicate())

    @property
    def _label(self) -> str | None:
        """What this rank's state is filed under; None where all ranks have the same."""
        differs = self.shard or any(target.sharded for target in self.targets)
        return f"rank {self.rank} of {self.size}" if self.group is not None and differs else None

    def wrap(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict whose keys tell whose it is: savers that take equal keys for equal tensors would lose all but one."""
        if self._label is None:
            return state_dict
        states = {i: {self._label: flat} for i, flat in state_dict["state"].items()}
        return state_dict | {"state": states, "mango": {self._label: state_dict["mango"]}}

    def unwrap(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Undo `wrap`. ValueError for the state dict of another rank, or of another number of ranks."""
        mine = state_dict.get("mango", {})
        found = [key for key in mine if key.startswith("rank ")]
        if "mango" not in state_dict or (self._label is None and not found):
            return dict(state_dict)
        if self._label not in found:
            saved = found[0] if found else "an optimizer that is not shared"
            raise ValueError(f"the state dict is of {saved}, and this is {self._label or 'one that is not shared'}; take"
                             " mango.distributed.checkpoint_state and load_checkpoint_state")  # fmt: skip
        states = {i: flat[self._label] for i, flat in state_dict["state"].items()}
        return dict(state_dict) | {"state": states, "mango": mine[self._label]}


def largest_shard(param: Any) -> Shape:
    """The shape of a DTensor's largest shard: the first rank's."""
    shape = list(param.shape)
    for i, placement in enumerate(param.placements):
        if placement.is_shard():
            shape[placement.dim] = -(-shape[placement.dim] // param.device_mesh.size(i))
    return tuple(shape)


def offset_of(param: Any) -> Shape:
    """Where this rank's part of a parameter begins in the whole: zeros, but for a DTensor."""
    if not hasattr(param, "device_mesh"):
        return (0,) * len(param.shape)
    chunks: Any = param.__create_chunk_list__()              # what torch.distributed.checkpoint asks a tensor for
    if len(chunks) != 1:
        raise ValueError(f"this rank's part of a tensor of shape {tuple(param.shape)} is in {len(chunks)} pieces, not in one")
    offset: Shape = tuple(chunks[0].offsets)
    return offset


@torch.no_grad()
def clip_grad_norm(targets: Sequence[Target], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` where some parameters are DTensors: the l2 norm is that of the whole gradients."""
    if not any(target.sharded for target in targets):
        return torch.nn.utils.clip_grad_norm_([t.param for t in targets], max_norm)
    squares: dict[tuple[Any, Any], list[Tensor]] = {}
    gradients = [(t, grad) for t in targets if (grad := t.grad) is not None]
    for target, grad in gradients:
        place = (getattr(target.param, "device_mesh", None), getattr(target.param, "placements", ()))
        squares.setdefault(place, []).append(torch.linalg.vector_norm(grad.float()).square())
    total = torch.zeros((), device=gradients[0][1].device) if gradients else torch.zeros(())
    for (mesh, placements), found in squares.items():
        part = torch.stack(found).sum()
        for i, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(part, group=mesh.get_group(i))
        total = total + part
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in gradients:
        grad.mul_(factor)
    return norm
