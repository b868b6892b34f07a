"""Several processes: gradients that travel encoded, and checkpoints that resume at another number of ranks.

How ranks share the state and agree on decisions is in `mango.ranks`, and needs no more than building the optimizer alike on
every rank. Here is what a training script calls: `encoded_gradient_hook` for DistributedDataParallel, and
`checkpoint_state` with `load_checkpoint_state` for torch.distributed.checkpoint.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from mango import noise
from mango.codecs import Encoded, Shape, encode
from mango.formats import SIGNED
from mango.optimizer import MANGO
from mango.ranks import offset_of
from mango.state import Target, TensorState

SAMPLED = ("mean", "square", "previous")                     # tables of the statistics with a row per sampled entry
MOMENTS = ("exp_avg", "exp_avg_sq")
NORMS = ("norm", "running_norm", "moved")
PREFIXES = re.compile(r"^(module|_orig_mod)\.|(?<=\.)(_orig_mod|_checkpoint_wrapped_module)\.")  # that wrappers put into names


class EncodedGradients:
    """What `encoded_gradient_hook` keeps: the format, the bytes it sent, and the errors that it owes.

    Args:
        bits: per value, on the menu of signed formats. 32: DDP's own all-reduce.
        error_feedback: round to nearest and carry the error over, at `residual_bits`; otherwise rounding is stochastic
            (unbiased), with noise of each rank's own, so that errors average out over ranks as well as over steps.
        process_group: DDP's; None: all processes.

    An all-gather sends each rank's codes to every other: ranks * bits / 64 of the bytes of a 32-bit ring all-reduce. It
    pays below 64 / bits ranks: 8 at 8 bits, 16 at 4.
    """

    def __init__(
        self, bits: int = 8, *, error_feedback: bool = False, residual_bits: int = 8, process_group: Any = None, seed: int = 0
    ) -> None:
        if bits not in SIGNED or residual_bits not in SIGNED:
            raise ValueError(f"bits={bits}, residual_bits={residual_bits}: choose from {tuple(SIGNED)}")
        self.bits, self.error_feedback, self.residual_bits, self.seed = bits, error_feedback, residual_bits, seed
        self.group: Any = dist.group.WORLD if process_group is None else process_group
        self.sent_bytes = 0                                  # by this rank, in a ring
        self.plain_bytes = 0                                 # that a ring all-reduce in the gradients' own dtype would send
        self._calls: dict[int, int] = {}                     # of each bucket
        self._owed: dict[int, tuple[list[int], Encoded]] = {}  # by bucket: its parameters, and the error to carry over

    @property
    def nbytes(self) -> int:
        """Bytes of the errors carried over."""
        return sum(owed.nbytes for _, owed in self._owed.values())

    def encode(self, bucket: Any) -> tuple[Encoded, Tensor]:
        """The bucket's gradients (N,) encoded, with what is owed added in; and 0, or nan where they are not finite (1,)."""
        index, params = bucket.index(), [id(param) for param in bucket.parameters()]
        calls = self._calls[index] = self._calls.get(index, 0) + 1
        wanted = bucket.buffer().float()
        poison = (wanted * 0).sum()[None]                    # not every format would tell
        if not self.error_feedback:
            key = noise.step_key(self.seed, index * self.group.size() + self.group.rank(), calls)
            return encode(SIGNED[self.bits], wanted, noise.split(key, noise.GRADIENT)), poison
        known, before = self._owed.pop(index, ([], None))
        # DDP forms other buckets after the first backward pass: what was owed then is forgiven.
        owed = torch.zeros_like(wanted) if before is None or known != params else before.decode()
        wanted = wanted + owed
        encoded = encode(SIGNED[self.bits], wanted)
        error = torch.where(poison == 0, wanted - encoded.decode(), owed)
        self._owed[index] = params, encode(SIGNED[self.residual_bits], error)
        return encoded, poison


def encoded_gradient_hook(state: EncodedGradients, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """A DDP communication hook: gradients travel as codes and scales, and are decoded and averaged on every rank alike.

    Where one gradient of a bucket is not finite, the whole bucket becomes nan on all ranks.

    >>> # ddp.register_comm_hook(EncodedGradients(bits=8), encoded_gradient_hook)
    """
    buffer, ranks = bucket.buffer(), state.group.size()
    state.plain_bytes += 2 * (ranks - 1) * buffer.numel() * buffer.element_size() // ranks
    if state.bits == 32:
        state.sent_bytes += 2 * (ranks - 1) * buffer.numel() * buffer.element_size() // ranks
        return allreduce_hook(state.group, bucket)
    encoded, poison = state.encode(bucket)
    message = torch.cat([part.reshape(-1).view(torch.uint8) for part in [*encoded.parts.values(), poison]])
    state.sent_bytes += (ranks - 1) * message.numel()
    gathered = message.new_empty(ranks * message.numel())
    work: Any = dist.all_gather_into_tensor(gathered, message, group=state.group, async_op=True)

    def average(_: Any) -> Tensor:
        total = torch.zeros_like(buffer, dtype=torch.float32)
        for part in gathered.chunk(ranks):                   # in the same order on all ranks, so that they end up equal
            total += _like(encoded, part[:-4]).decode() + part[-4:].clone().view(torch.float32)
        mean: Tensor = buffer.copy_(total / ranks)
        return mean

    future: Future[Tensor] = work.get_future().then(average)
    return future


def _like(encoded: Encoded, message: Tensor) -> Encoded:
    """Another rank's message as an encoding of the same format and shape."""
    sizes = [part.numel() * part.element_size() for part in encoded.parts.values()]
    pieces = torch.split(message, sizes)
    parts = {
        name: piece.clone().view(part.dtype).view(part.shape)             # cloned: dtypes want their bytes aligned
        for (name, part), piece in zip(encoded.parts.items(), pieces, strict=True)
    }
    return Encoded(encoded.codec, encoded.shape, parts)


# -- checkpoints

@dataclass(frozen=True, slots=True)
class _Box:
    """A part of a tensor: where it begins, and its shape."""

    offset: tuple[int, ...]
    shape: Shape

    def within(self, other: "_Box") -> tuple[slice, ...]:
        """Where the two meet, as slices of `self`."""
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        return tuple(slice(max(a, b) - a, max(max(a, b), min(a + n, b + m)) - a) for a, n, b, m in ends)

    def shared(self, other: "_Box") -> int:
        """Entries that both have."""
        return math.prod(part.stop - part.start for part in self.within(other))


def checkpoint_state(optimizer: MANGO) -> dict[str, Tensor]:
    """This rank's part of the optimizer's state, as tensors alone, for torch.distributed.checkpoint.

    Keys name what is in them: parameter and offset for encoded state, the rank for what belongs to no one tensor. No two
    ranks give different tensors under one key. Call it on every rank; `load_checkpoint_state` reads it back.

    >>> # dcp.save({"model": model.state_dict(), "optimizer": checkpoint_state(optimizer)}, checkpoint_id=path)
    """
    ranks = optimizer.ranks
    plain = ranks.unwrap(optimizer.state_dict())
    statistics = plain["mango"].pop("statistics")
    run = {"groups": plain["param_groups"], "mango": plain["mango"], "steps": statistics["steps"],
           "layers": [_name(layer.name) for layer in optimizer.layers]}  # fmt: skip
    found = _flat(f"run@{ranks.rank} of {ranks.size}", run)
    for i, flat in plain["state"].items():
        target = optimizer.targets[i]
        if not ranks.speaks(target):
            continue
        offset = offset_of(target.param)
        facts = {"offset": list(offset), "whole": list(target.param.shape), "state": flat,
                 "statistics": _statistics_of(optimizer, target, statistics)}  # fmt: skip
        found |= _flat(f"{_name(target.name)}@{','.join(map(str, offset))}", facts)
    return found


def load_checkpoint_state(optimizer: MANGO, source: Any, prefix: str = "optimizer") -> None:
    """Restore what `checkpoint_state` gave, on every rank, saved by any number of ranks in any of the three ways of sharing.

    A tensor, or a shard of one, that was saved as it lies here is restored code by code. Other shards are decoded, put
    together and encoded anew, one tensor at a time. What exceeds the optimizer's own budget is cut to it.

    Args:
        source: the checkpoint's folder, a `StorageReader` of torch.distributed.checkpoint, or the dict itself.
        prefix: the key that the dict was saved under.

    Raises:
        ValueError: another model, or a checkpoint of which parts are missing.
    """
    read, keys = _reader(source, prefix)
    run = _run(optimizer, read, keys)
    saved: dict[str, list[str]] = {}
    for key in keys:
        if key.endswith("#") and not key.startswith("run@"):
            saved.setdefault(key.rpartition("@")[0], []).append(key)
    statistics = optimizer.statistics.state_dict() | {"steps": run["steps"]}
    states = {}
    for i, target in enumerate(optimizer.targets):
        if target.mine and (blobs := saved.get(_name(target.name))):
            flat, rows = _tensor_state(optimizer, target, [_decode(blob) for blob in read(blobs).values()], read)
            states[i] = flat
            _put_statistics(optimizer, target, statistics, rows)
    mango = run["mango"] | {"statistics": statistics, "applied": _in_order(optimizer, run)}
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(run["groups"]):
        raise ValueError(f"the checkpoint has {len(run['groups'])} parameter groups, this optimizer {len(own)}")
    groups = [
        group | {"betas": tuple(group["betas"])} | {name: ours[name] for name in ("params", "param_names") if name in ours}
        for group, ours in zip(run["groups"], own, strict=True)
    ]
    optimizer.load_state_dict(optimizer.ranks.wrap({"state": states, "param_groups": groups, "mango": mango}))


Read = Callable[[Iterable[str]], dict[str, Tensor]]


def _reader(source: Any, prefix: str) -> tuple[Read, list[str]]:
    """A function that reads tensors by key, and all keys there are."""
    if isinstance(source, Mapping):
        return lambda keys: {key: source[key] for key in keys}, list(source)
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(source) if isinstance(source, str | os.PathLike) else source
    entries: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    there = {name.removeprefix(f"{prefix}."): (name, entry) for name, entry in entries.items() if name.startswith(f"{prefix}.")}
    if not there:
        raise ValueError(f"the checkpoint has nothing under {prefix!r} that checkpoint_state gave")

    def read(keys: Iterable[str]) -> dict[str, Tensor]:
        wanted = {key: torch.empty(there[key][1].size, dtype=there[key][1].properties.dtype) for key in keys}
        by_name = {there[key][0]: tensor for key, tensor in wanted.items()}
        with warnings.catch_warnings():                      # each rank reads what it needs, which is not the same for all
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(by_name, storage_reader=reader, no_dist=True)
        return wanted

    return read, list(there)


def _flat(key: str, tree: Any) -> dict[str, Tensor]:
    """Nested dicts and lists as tensors: those in it under keys of their own, and the rest as JSON under `key#`."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node
            return {"#": path}
        if isinstance(node, Mapping):
            return {name: walk(value, f"{path}:{name}") for name, value in node.items()}
        return [walk(value, f"{path}:{i}") for i, value in enumerate(node)] if isinstance(node, list | tuple) else node

    text = json.dumps(walk(tree, key)).encode()
    return {f"{key}#": torch.frombuffer(bytearray(text), dtype=torch.uint8)} | tensors


def _decode(blob: Tensor) -> Any:
    return json.loads(bytes(blob.tolist()))


def _unflat(tree: Any, read: Read) -> Any:
    """Undo `_flat`, reading the tensors that are named."""
    names: list[str] = []

    def walk(node: Any, found: Mapping[str, Tensor] | None) -> Any:
        if isinstance(node, dict) and set(node) == {"#"}:
            names.append(node["#"])
            return None if found is None else found[node["#"]]
        if isinstance(node, dict):
            return {name: walk(value, found) for name, value in node.items()}
        return [walk(value, found) for value in node] if isinstance(node, list) else node

    walk(tree, None)
    return walk(tree, read(names) if names else {})


def _name(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return PREFIXES.sub("", name)


def _run(optimizer: MANGO, read: Read, keys: Sequence[str]) -> Any:
    """What belongs to no one tensor: this rank's own, or of a run on another number of ranks what they had in common."""
    ranks = optimizer.ranks
    own = f"run@{ranks.rank} of {ranks.size}#"
    blobs = [own] if own in keys else sorted(key for key in keys if key.startswith("run@") and key.endswith("#"))
    if not blobs:
        raise ValueError("the checkpoint has no run: save what checkpoint_state gives, of every rank")
    runs = [_unflat(_decode(blob), read) for blob in read(blobs).values()]
    first = runs[0]
    if len(runs) > 1:                                        # partial sums over each rank's losses
        losses = [run["mango"]["losses"] for run in runs]
        before = [loss["before"] for loss in losses if loss["before"] is not None]
        first["mango"]["losses"] |= {
            "before": sum(before) / len(before) if before else None,
            "total": sum(loss["total"] for loss in losses) / len(losses),
            "count": round(sum(loss["count"] for loss in losses) / len(losses)),
        }
        first["mango"]["skipped"] = max(run["mango"]["skipped"] for run in runs)
    return first


def _in_order(optimizer: MANGO, run: Any) -> list[Any]:
    """The configs that were in force, in the order of this optimizer's layers."""
    applied = dict(zip(run["layers"], run["mango"]["applied"], strict=True))
    names = [_name(layer.name) for layer in optimizer.layers]
    if set(names) != set(applied):
        raise ValueError(f"the checkpoint is of other layers: {sorted(set(names) ^ set(applied))[:4]} are on one side only")
    return [applied[name] for name in names]


def _tensor_state(optimizer: MANGO, target: Target, facts: Sequence[Any], read: Read) -> tuple[Any, dict[str, Tensor]]:
    """What of a tensor's saved state is kept here, as plain tensors, and its statistics."""
    if any(tuple(fact["whole"]) != tuple(target.param.shape) for fact in facts):
        raise ValueError(f"{target.name} has shape {tuple(target.param.shape)}; the checkpoint's has {tuple(facts[0]['whole'])}")
    own = _Box(offset_of(target.param), tuple(target.local.shape))
    boxes = [_Box(tuple(fact["offset"]), tuple(fact["state"]["shape"])) for fact in facts]
    if own in boxes:
        exact = _unflat(facts[boxes.index(own)], read)
        return exact["state"], exact["statistics"]
    shared = [own.shared(box) for box in boxes]
    if sum(shared) != math.prod(own.shape):
        raise ValueError(f"this rank needs {math.prod(own.shape)} entries of {target.name}; the checkpoint has {sum(shared)}")
    needed = [i for i, count in enumerate(shared) if count]
    pieces = [_unflat(facts[i], read) for i in needed]
    states = [TensorState.from_plain(piece["state"], optimizer.options, target.local.device) for piece in pieces]
    state = _stitch(own, [boxes[i] for i in needed], states, optimizer.key_of(target))
    weights = [shared[i] / math.prod(boxes[i].shape) for i in needed]
    return state.to_plain(), _merged([piece["statistics"] for piece in pieces], weights, [shared[i] for i in needed])


def _stitch(own: _Box, boxes: Sequence[_Box], states: Sequence[TensorState], key: int) -> TensorState:
    """One state of the pieces that meet `own`: decoded, put together, and encoded as they were."""
    first = states[0]
    plain = replace(first.config, momentum_bits=32, variance_bits=32, rank=0)
    state = TensorState(own.shape, plain, first.options, first.rule, max(s.step for s in states))
    state.create(first.device)
    if first.correction is not None:
        state.correction = torch.zeros(own.shape, dtype=first.correction.dtype, device=first.device)
    others = {slot: torch.zeros(own.shape, device=first.device) for slot in state.encoded if slot not in MOMENTS}
    for box, piece in zip(boxes, states, strict=True):
        here, there = own.within(box), box.within(own)
        for slot, dense in zip(MOMENTS, piece.moments(), strict=True):
            if dense is not None:
                state.encoded[slot].parts["values"][here] = dense[there]
        for slot in set(others) & set(piece.encoded):
            others[slot][here] = piece.encoded[slot].decode()[there]
        if state.correction is not None and piece.correction is not None:
            state.correction[here] = piece.correction[there]
    for slot, dense in others.items():
        state.encoded[slot] = encode(state.layout()[slot][0], dense)
    state.transcode(first.config, key)
    return state


def _statistics_of(optimizer: MANGO, target: Target, tables: Mapping[str, Any]) -> dict[str, Tensor]:
    """One layer's rows of the statistics' tables."""
    if target.layer is None:
        return {}
    start, count, _ = optimizer.statistics.sample(target.layer)
    places = {name: slice(start, start + count) if name in SAMPLED else target.layer for name in tables}
    return {name: table[places[name]].clone() for name, table in tables.items() if isinstance(table, Tensor)}


def _put_statistics(optimizer: MANGO, target: Target, tables: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
    if target.layer is None:
        return
    start, count, _ = optimizer.statistics.sample(target.layer)
    for name, row in rows.items():
        place = slice(start, start + count) if name in SAMPLED else target.layer
        tables[name][place] = row


def _merged(pieces: Sequence[Mapping[str, Tensor]], shares: Sequence[float], entries: Sequence[int]) -> dict[str, Tensor]:
    """Statistics of parts of several shards: norms of what is shared, means over entries. Samples and the window start over."""
    merged = {}
    for name in pieces[0]:
        if name in NORMS:
            squares = [piece[name].square() * share for piece, share in zip(pieces, shares, strict=True)]
            merged[name] = torch.stack(squares).sum(0).sqrt()
        elif name == "probed":
            parts = [piece[name] * (count / sum(entries)) for piece, count in zip(pieces, entries, strict=True)]
            merged[name] = torch.stack(parts).sum(0)
        else:
            merged[name] = torch.zeros(())
    return merged
