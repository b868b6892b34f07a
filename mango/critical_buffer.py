"""The memory of Critical Gradients and Critical Momenta: per tensor, the `topC` items of highest priority.

A priority is a gradient's norm, multiplied by `decay` at every step; a free slot has priority -inf. So one rule fills and
replaces: an item is taken where its priority exceeds the least one, strictly, and goes into that slot (McRae et al. 2022,
sec. 3). Decisions over many tensors are made at once and stay on their device: nothing here waits for a GPU.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mango.codecs import CODECS, Encoded, encode
from mango.formats import SIGNED

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}       # of `buffer_dtype`, and how the table calls them
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "int8": "signed8", "int6": "lognormal6", "int4": "nf4"}
BUFFER_CODECS = tuple(codec.name for codec in SIGNED.values())
LARGEST = 3e38                                                        # norms from here on are none: every format holds less
FREE = -math.inf
SUMMED_AFRESH = 2                                                     # up to here, items are summed as quickly as a sum is kept


def buffer_codec(codec: str | None, dtype: torch.dtype | None = None) -> str | None:
    """The name in `CODECS` of what `buffer_codec=` or `buffer_dtype=` asks for; None stores items in the parameter's dtype.

    >>> buffer_codec("int8"), buffer_codec(None, torch.bfloat16), buffer_codec(None)
    ('signed8', 'bfloat16', None)
    """
    if codec is not None and dtype is not None:
        raise ValueError(f"buffer_codec={codec!r} and buffer_dtype={dtype} are two words for one thing: give one")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"buffer_dtype={dtype} is none of {', '.join(map(str, DTYPES))}; other formats are buffer_codec's")
    name = DTYPES[dtype] if dtype is not None else codec if codec is None else ALIASES.get(codec, codec)
    if name is not None and name not in BUFFER_CODECS:
        raise ValueError(f"buffer_codec={codec!r} is none of {', '.join((*ALIASES, *BUFFER_CODECS))}")
    return name


@dataclass(slots=True)
class CriticalBuffer:
    """Up to `topC` items of one tensor's shape, and its books. `codec` None: items are stored in the parameter's dtype."""

    codec: str | None
    numel: int                                               # N, entries of an item
    keys: Tensor                                             # (C,) float32 or float64: priority, -inf where the slot is free
    ages: Tensor                                             # (C,) int32: rises by one with every item taken; 0: free
    decisions: Tensor                                        # (2,) int64: items taken and refused while the buffer was full
    rows: dict[str, Tensor]                                  # parts of the stored items, each (C, ...)
    running: Tensor | None = None                            # (N,) the sum of the items

    @classmethod
    def of(cls, param: Tensor, codec: str | None, size: int, running_sum: bool | None = None) -> "CriticalBuffer":
        """An empty buffer of `size` slots for items of the parameter's shape."""
        n, device = param.numel(), param.device
        if codec is None or n == 0:
            rows = {"values": torch.zeros(size, n, dtype=param.dtype, device=device)}
        else:
            empty = encode(CODECS[codec], torch.zeros(n, device=device)).parts
            rows = {name: part.new_zeros(size, *part.shape) for name, part in empty.items()}
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        keys = torch.full((size,), FREE, dtype=wide, device=device)
        if running_sum is None:
            running_sum = size > SUMMED_AFRESH
        ages, decisions = keys.new_zeros(size, dtype=torch.int32), keys.new_zeros(2, dtype=torch.int64)
        return cls(codec, n, keys, ages, decisions, rows, keys.new_zeros(n) if running_sum else None)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages: items and books."""
        small = [self.keys, self.ages, self.decisions] + ([] if self.running is None else [self.running])
        return sum(part.untyped_storage().nbytes() for part in [*small, *self.rows.values()])

    def item(self, slot: int) -> Tensor:
        """What a slot holds: (N,), zeros where it is free."""
        return self._decode({name: rows[slot] for name, rows in self.rows.items()})

    def blend(self, x: Tensor, share: float | Tensor) -> Tensor:
        """x plus `share` (a tensor of no dimension on a GPU) times the sum of the items: a new tensor of x's shape."""
        flat, values = x.reshape(-1), self.rows.get("values")
        if self.running is None and values is not None and values.dtype == x.dtype == self.keys.dtype:
            shares = self.keys.new_full((), share) if isinstance(share, float) else share
            return torch.addmv(flat, values.T, shares.expand(len(self.keys))).view(x.shape)
        total = self.total() if self.running is None else self.running
        if isinstance(share, float):
            return torch.add(flat.to(total.dtype), total, alpha=share).to(x.dtype).view(x.shape)
        return torch.addcmul(flat.to(total.dtype), total, share).to(x.dtype).view(x.shape)

    def total(self) -> Tensor:
        """The sum of the items afresh, in float32 or wider: (N,)."""
        found = torch.zeros(self.numel, dtype=self.keys.dtype, device=self.keys.device)
        for slot in range(len(self.keys)):
            found += self.item(slot)                         # a free slot holds zeros
        return found

    def put(self, x: Tensor, slot: int | Tensor, take: bool | Tensor) -> None:
        """Store x in the slot where it is to be taken. On a GPU both are tensors of no dimension, and nothing is waited for."""
        if take is False:
            return
        parts = self._parts(x.reshape(-1))
        if isinstance(slot, int):
            if self.running is not None:
                self.running.sub_(self.item(slot))
            for name, part in parts.items():
                self.rows[name][slot] = part
            if self.running is not None:
                self.running.add_(self.item(slot))
            return
        place = slot.view(1)
        old = {name: rows.index_select(0, place)[0] for name, rows in self.rows.items()}
        new = {name: torch.where(torch.as_tensor(take), part.to(old[name].dtype), old[name])
               for name, part in parts.items()}  # fmt: skip
        for name, part in new.items():
            self.rows[name].index_copy_(0, place, part[None])
        if self.running is not None:
            self.running.sub_(self._decode(old)).add_(self._decode(new))

    def _decode(self, parts: dict[str, Tensor]) -> Tensor:
        if self.codec is None or "values" in parts:
            return parts["values"]
        return Encoded(self.codec, (self.numel,), parts).decode()

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        if self.codec is None or "values" in self.rows:
            return {"values": flat}                          # rounded to nearest by the copy
        return encode(CODECS[self.codec], flat).parts

    def to_plain(self) -> dict[str, Any]:
        """Tensors and names for a state dict."""
        books = {"codec": self.codec, "numel": self.numel, "keys": self.keys, "ages": self.ages, "decisions": self.decisions,
                 "rows": dict(self.rows)}  # fmt: skip
        return books if self.running is None else books | {"running": self.running}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device) -> "CriticalBuffer":
        """Undo `to_plain` with copies on the device, every dtype as it was."""

        def own(part: Tensor) -> Tensor:
            return part.to(device, copy=True)

        running = plain.get("running")
        return cls(plain["codec"], plain["numel"], own(plain["keys"]), own(plain["ages"]), own(plain["decisions"]),
                   {name: own(part) for name, part in plain["rows"].items()},
                   None if running is None else own(running))  # fmt: skip


@dataclass(slots=True)
class Books:
    """The books of several buffers, a row each, on the first one's device."""

    keys: Tensor                                                                   # (L, C)
    ages: Tensor                                                                   # (L, C)
    decisions: Tensor                                                              # (L, 2)

    @classmethod
    def of(cls, buffers: Sequence[CriticalBuffer]) -> "Books":
        return cls(*(gathered([getattr(b, name) for b in buffers]) for name in cls.__slots__))

    def file(self, buffers: Sequence[CriticalBuffer]) -> None:
        """Write every row back into its buffer."""
        for name in self.__slots__:
            torch._foreach_copy_([getattr(b, name) for b in buffers], list(getattr(self, name).unbind()))

    def shares(self, aggr: str, kappa: float) -> tuple[Tensor, Tensor]:
        """What each item weighs (L,), and by what the sum of gradient and weighed items is then multiplied (L,).

        sum: x + k mean(B). mid: half of that. mean: (x + k sum(B)) / (n + 1). An empty buffer changes nothing.
        """
        n = (self.keys > FREE).sum(1).to(self.keys.dtype)
        one = torch.ones_like(n)
        if aggr == "mean":
            return one * kappa, one / (n + 1)
        return kappa / n.clamp(min=1), torch.where(n > 0, 0.5, one) if aggr == "mid" else one

    def admit(self, priority: Tensor, fit: Tensor, by_age: Tensor) -> tuple[Tensor, Tensor]:
        """Decide for each buffer which slot its new item goes to and whether it is taken, and enter that: (L,) int64, bool.

        `priority` (L,); `fit` (L,): may be stored at all; `by_age` (L,): once full, the newest item replaces the oldest.
        """
        full = (self.keys > FREE).all(1)
        by_age = by_age & full
        least = self.keys.amin(1)
        leaves = by_age[:, None] | (self.keys == least[:, None])                   # of several the oldest one does
        slot = torch.where(leaves, self.ages, torch.iinfo(torch.int32).max).argmin(1)
        place = slot[:, None]
        take = fit & (by_age | (priority > least))
        newest = self.ages.amax(1) + 1
        before = self.keys.gather(1, place)[:, 0]
        self.keys.scatter_(1, place, torch.where(take, priority.to(before.dtype), before)[:, None])
        self.ages.scatter_(1, place, torch.where(take, newest, self.ages.gather(1, place)[:, 0])[:, None])
        self.decisions += torch.stack([full & take, full & ~take], 1)
        return slot, take

    def decay(self, factor: float) -> None:
        """Age all priorities, those of new items included."""
        self.keys = torch.where(self.keys > FREE, self.keys * factor, self.keys)


def gathered(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors stacked, on the first one's device."""
    return torch.stack([t.to(tensors[0].device) for t in tensors])


def beside(values: Tensor, tensors: Sequence[Tensor]) -> list[Any]:
    """Values (L,), one for each tensor: numbers if they are on the CPU, else tensors of no dimension where the tensor is."""
    if values.device.type == "cpu":
        return values.tolist()
    return [value.to(t.device) for value, t in zip(values.unbind(), tensors, strict=True)]


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms, of narrow dtypes in float32: (L,) on the first one's device."""
    if len({(t.device, t.dtype) for t in tensors}) > 1:
        return gathered([norms([t])[0] for t in tensors])
    wide = None if tensors[0].dtype == torch.float64 else torch.float32
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide))
