"""Critical Gradients and Critical Momenta: torch's SGD, RMSprop, Adam and AdamW with a memory of large gradients.

Each tensor keeps the `topC` gradients (Adam_CM: momenta) of highest priority, and the base rule is applied to the current one
together with their mean (McRae et al. 2022, "Memory Augmented Optimizers for Deep Learning"; Malviya et al. 2024, "Promoting
Exploration in Memory-Augmented Adam using Critical Momenta"). The base rules are torch's own functions. docs/critical.md has
the rules, the bytes, and what differs from the public packages, which `compatible=` brings back.
"""

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, ClassVar, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from mango import critical_published, noise
from mango.critical_buffer import LARGEST, Books, CriticalBuffer, beside, buffer_codec, norms

__all__ = ["SGD_C", "AdamW_C", "Adam_C", "Adam_CM", "RMSprop_C"]

AGGREGATIONS = ("sum", "mid", "mean")
ANALYSE_EVERY = 16                                            # steps between measurements for `get_analysis`
SUM_EVERY = 64                                                # steps between sums afresh: what rounding a running sum keeps


class Memory(TypedDict, total=False):
    """Options of the memory, by keyword or in a parameter group. Defaults: those here, and a class's own as it says."""

    topC: int                               # items kept per tensor, >= 1; 10
    decay: float                            # of priorities, per step, in [0, 1]; 0.7
    kappa: float                            # weight of what is kept, >= 0; 0 is the base optimizer; 1
    aggr: str                               # sum: x + k mean(B); mid: half of it; mean: (x + k sum(B)) / (n + 1)
    synced: bool                            # priority: sum of the group's norms, or the tensor's own; True
    critical_test: float                    # share of replacements by age in [0, 1]: 0 priority, 1 FIFO; 0
    buffer_codec: str | None                # how items are stored: "int8", "int4", "bf16", ...; None: as they come
    running_sum: bool | None                # keep the sum of items, 4 bytes per value; None: where that is quicker
    buffer_dtype: torch.dtype | None        # the same as a dtype: torch.bfloat16 or torch.float32
    seed: int                               # of the draws where 0 < critical_test < 1; 0
    compatible: str | None                  # do as a public package does: "cg", "cg_eff", "cm"; None


_OPTIONS = tuple(Memory.__annotations__)


class _Critical(Optimizer):
    """What the optimizers share: options, the memory's step, statistics, state dicts. A class adds its base rule."""

    packages: ClassVar[tuple[str, ...]] = critical_published.VARIANTS              # that have this class
    memory: ClassVar[Memory] = {}                                                  # defaults of its own

    def __init__(self, params: ParamsT, defaults: dict[str, Any], memory: Memory) -> None:
        unknown = sorted(set(memory) - set(_OPTIONS))
        if unknown:
            raise TypeError(f"{type(self).__name__} knows no {', '.join(unknown)}; the memory's options: {', '.join(_OPTIONS)}")
        common = {"topC": 10, "decay": 0.7, "kappa": 1.0, "aggr": "mean", "synced": True, "critical_test": 0.0,
                  "buffer_codec": None, "running_sum": None, "seed": 0, "compatible": None, "steps": 0}  # fmt: skip
        self._sums = torch.zeros(3)
        self._measured = 0
        self._draws: critical_published.Draws | None = None
        super().__init__(params, _one_codec({**defaults, **common, **self.memory, **memory}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; options are checked."""
        super().add_param_group(_one_codec(param_group))
        group = self.param_groups[-1]
        _check(group, self.packages)
        if any(p.is_complex() for p in group["params"]):
            raise TypeError("complex parameters are not supported; pass torch.view_as_real(parameter)")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if any(g.is_sparse for g in grads):
                raise ValueError(f"{type(self).__name__} keeps dense gradients; build the embedding with sparse=False")
            if params:
                self._move(group, params, grads)
                group["steps"] += 1
        return loss

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """The base rule on what `_recall` gives."""
        raise NotImplementedError

    def _buffers(self, group: Mapping[str, Any], params: list[Tensor]) -> list[CriticalBuffer]:
        running_sum = False if group["compatible"] else group["running_sum"]       # it has one of its own making
        for p in params:
            if "critical" not in self.state[p]:
                self.state[p]["critical"] = CriticalBuffer.of(p, group["buffer_codec"], group["topC"], running_sum)
        buffers: list[CriticalBuffer] = [self.state[p]["critical"] for p in params]
        if any(len(buffer.keys) != group["topC"] for buffer in buffers):
            raise ValueError(f"topC={group['topC']}, but buffers of another size are there: it is fixed by the first step")
        return buffers

    def _recall(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], items: list[Tensor]
    ) -> list[Tensor]:
        """Each of `items` with what its buffer holds; then the buffers are offered the items, by the norms of `grads`.

        An item that is not finite, or whose priority is not, is never stored.
        """
        if group["kappa"] == 0:
            return [item.contiguous() for item in items]
        buffers = self._buffers(group, params)
        if group["compatible"]:
            return critical_published.recall(type(self).__name__, group, buffers, grads, items, self._drawn(group))
        books, sizes = Books.of(buffers), norms(grads)
        shares, scales = books.shares(group["aggr"], group["kappa"])
        moves = [buffer.blend(item, share) for buffer, item, share in zip(buffers, items, beside(shares, items), strict=True)]
        if group["aggr"] != "sum":
            for move, scale in zip(moves, beside(scales, moves), strict=True):
                move.mul_(scale)
        if group["steps"] % ANALYSE_EVERY == 0:
            self._measure(books, buffers, sizes, moves)
        priority = sizes.sum().expand_as(sizes) if group["synced"] else sizes
        fit = (priority < LARGEST) & ((sizes if items is grads else norms(items)) < LARGEST)
        slots, takes = books.admit(priority, fit, self._by_age(group, sizes))
        for buffer, item, slot, take in zip(buffers, items, beside(slots, items), beside(takes, items), strict=True):
            buffer.put(item, slot, take)
            if buffer.running is not None and group["steps"] % SUM_EVERY == SUM_EVERY - 1:
                buffer.running = buffer.total()
        books.decay(group["decay"])
        books.file(buffers)
        return moves

    def _by_age(self, group: dict[str, Any], sizes: Tensor) -> Tensor:
        """For which tensors age decides in this step: (L,) bool. A number per group, step and tensor; nothing is kept."""
        share: float = group["critical_test"]
        if share in (0, 1):
            return torch.full(sizes.shape, share == 1, device=sizes.device)
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        return noise.uniform(len(sizes), noise.step_key(group["seed"], number, group["steps"]), sizes.device) < share

    def _drawn(self, group: dict[str, Any]) -> critical_published.Draws:
        if self._draws is None:
            self._draws = critical_published.Draws(group["seed"])
        return self._draws

    def _measure(self, books: Books, buffers: list[CriticalBuffer], sizes: Tensor, moves: list[Tensor]) -> None:
        shares, _ = books.shares("sum", 1.0)
        means = [
            buffer.blend(torch.zeros_like(move), share)
            for buffer, move, share in zip(buffers, moves, beside(shares, moves), strict=True)
        ]
        found = torch.stack([sizes.sum(), norms(means).sum(), norms(moves).sum()])
        self._sums = self._sums.to(found) + found
        self._measured += len(moves)

    def get_offline_stats(self) -> dict[str, int]:
        """Decisions of full buffers: how often the new item was taken ("yes") and refused ("no"). Waits for a GPU."""
        found = [state["critical"].decisions.cpu() for state in self.state.values() if "critical" in state]
        yes, no = torch.stack(found).sum(0).tolist() if found else (0, 0)
        return {"yes": yes, "no": no}

    def reset_offline_stats(self) -> None:
        for state in self.state.values():
            if "critical" in state:
                state["critical"].decisions.zero_()

    def get_analysis(self) -> dict[str, float]:
        """Sums of norms over `count` tensors, taken every 16th step: of gradients, of buffers' means, and of what moved.

        The names are the public packages': gt, gc, gc_aggr. They never fill theirs.
        """
        gt, gc, gc_aggr = self._sums.tolist()
        return {"gt": gt, "gc": gc, "gc_aggr": gc_aggr, "count": self._measured}

    def reset_analysis(self) -> None:
        self._sums, self._measured = torch.zeros(3), 0

    getOfflineStats, resetOfflineStats = get_offline_stats, reset_offline_stats    # as the public packages call them
    getAnalysis, resetAnalysis = get_analysis, reset_analysis

    def state_bytes(self) -> int:
        """Bytes of all storages of the state: moments, step counts, buffers with their books."""
        parts = chain.from_iterable(state.values() for state in self.state.values())
        return sum(_bytes(part) for part in parts)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and scalars, in torch's layout: `torch.load(weights_only=True)` reads it, and resuming is bit-exact."""
        plain = super().state_dict()
        plain["state"] = {i: _plain(state) for i, state in plain["state"].items()}
        plain["critical"] = {"class": type(self).__name__, "sums": self._sums, "measured": self._measured,
                             "draws": self._draws.count if self._draws is not None else None}  # fmt: skip
        return plain

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; buffers keep their dtypes, which torch's own loading would cast."""
        mine = state_dict.get("critical", {})
        if mine.get("class") != type(self).__name__:
            raise ValueError(f"this state dict is of {mine.get('class', 'another optimizer')}, not of {type(self).__name__}")
        rest = {i: {k: v for k, v in state.items() if k != "critical"} for i, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": rest})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, param in zip(numbers, params, strict=True):
            if "critical" in state_dict["state"].get(i, {}):
                self.state[param]["critical"] = CriticalBuffer.from_plain(state_dict["state"][i]["critical"], param.device)
        self._sums, self._measured = mine["sums"].clone(), mine["measured"]
        count = mine["draws"]
        self._draws = None if count is None else critical_published.Draws(self.param_groups[0]["seed"], count)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sums": self._sums, "_measured": self._measured, "_draws": self._draws}


class SGD_C(_Critical):
    """SGD with critical gradients; what is kept and aggregated is the gradient with its weight decay. Has no Nesterov.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = SGD_C([weight], lr=0.1, topC=5)
    >>> for _ in range(2):
    ...     weight.grad = torch.ones(3)
    ...     optimizer.step()
    >>> weight.tolist()                                       # 0.1, then 0.1 + 0.1: the kept gradient comes on top
    [-0.30000001192092896, -0.30000001192092896, -0.30000001192092896]
    """

    memory: ClassVar[Memory] = {"aggr": "sum"}

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, **memory: Unpack[Memory],
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, defaults, memory)

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        decayed = group["weight_decay"]
        items = [g.add(p, alpha=decayed) for g, p in zip(grads, params, strict=True)] if decayed else grads
        moves = self._recall(group, params, grads, items)
        kept: list[Tensor | None] = [self.state[p].get("momentum_buffer") for p in params]
        sgd(params, moves, kept, weight_decay=0.0, momentum=group["momentum"], lr=group["lr"], dampening=group["dampening"],
            nesterov=False, maximize=False)  # fmt: skip
        if group["momentum"]:
            for p, momentum in zip(params, kept, strict=True):
                self.state[p]["momentum_buffer"] = momentum


class RMSprop_C(_Critical):
    """RMSprop with critical gradients."""

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0,
        momentum: float = 0.0, centered: bool = False, **memory: Unpack[Memory],
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"centered": centered}, memory)

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        moves = self._recall(group, params, grads, grads)
        names = ["square_avg"] + ["grad_avg"] * group["centered"] + ["momentum_buffer"] * (group["momentum"] > 0)
        states = [_with_zeros(self.state[p], p, names) for p in params]
        square, mean, momentum = ([s[name] for s in states] if name in names else [] for name in _RMSPROP)
        rmsprop(params, moves, square, mean, momentum, [s["step"] for s in states], lr=group["lr"], alpha=group["alpha"],
                eps=group["eps"], weight_decay=group["weight_decay"], momentum=group["momentum"],
                centered=group["centered"])  # fmt: skip


_RMSPROP = ("square_avg", "grad_avg", "momentum_buffer")


class _Adam(_Critical):
    """What the three Adams share."""

    decoupled: ClassVar[bool] = False                         # weight decay shrinks the parameter itself

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, amsgrad: bool = False, **memory: Unpack[Memory],
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}, memory)

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        states = [_with_zeros(self.state[p], p, names) for p in params]
        moves, exp_avgs, beta1 = self._moments(group, params, grads, states)
        if self.decoupled and group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        on_cpu = bool(group["kappa"]) and all(p.device.type == "cpu" and p.is_contiguous() for p in params)
        adam(params, moves, exp_avgs, [s["exp_avg_sq"] for s in states],
             [s["max_exp_avg_sq"] for s in states if group["amsgrad"]], [s["step"] for s in states],
             fused=on_cpu or None,                            # torch's kernel of one pass; without a memory its own choice
             amsgrad=group["amsgrad"], beta1=beta1, beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
             weight_decay=0.0 if self.decoupled else group["weight_decay"], maximize=False)  # fmt: skip

    def _moments(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor], float]:
        """What Adam takes for gradients and first moments, and its beta1."""
        return self._recall(group, params, grads, grads), [s["exp_avg"] for s in states], group["betas"][0]


class Adam_C(_Adam):
    """Adam with critical gradients.

    >>> model = torch.nn.Linear(100, 10, bias=False)
    >>> optimizer = Adam_C(model.parameters(), lr=1e-3, topC=5, decay=0.7, buffer_codec="int8")
    >>> model(torch.ones(1, 100)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes() // 1000                       # 8 of Adam, 5 of the items, 4 of their sum; scales and books
    17
    """


class AdamW_C(_Adam):
    """AdamW with critical gradients."""

    decoupled = True
    packages = ("cg", "cg_eff")

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.01, amsgrad: bool = False, **memory: Unpack[Memory],
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **memory)


class Adam_CM(_Adam):
    """Adam with critical momenta (Malviya et al. 2024): momenta are kept, by the norms of their gradients, and aggregated.

    Weight decay is decoupled. The second moment is that of the aggregate. A momentum's bias is corrected before it is kept
    and aggregated, so that the first step has the length of Adam's.
    """

    decoupled = True
    packages = ("cm",)
    memory: ClassVar[Memory] = {"topC": 5, "aggr": "sum"}

    def _moments(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor], float]:
        beta1, exp_avgs = group["betas"][0], [s["exp_avg"] for s in states]
        if group["kappa"] == 0:
            return super()._moments(group, params, grads, states)
        if group["compatible"]:
            moves = critical_published.momenta(group, self._buffers(group, params), exp_avgs, grads, self._drawn(group))
            return moves, moves, beta1
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        corrections = [1 - beta1 ** (float(s["step"]) + 1) for s in states]
        moves = self._recall(group, params, grads, list(torch._foreach_div(exp_avgs, corrections)))
        return moves, moves, 0.0                              # Adam's average of one: its first moment is the aggregate


def _one_codec(options: dict[str, Any]) -> dict[str, Any]:
    """The options with `buffer_dtype` told as a codec."""
    if "buffer_codec" in options or "buffer_dtype" in options:
        rest = {name: value for name, value in options.items() if name != "buffer_dtype"}
        return rest | {"buffer_codec": buffer_codec(options.get("buffer_codec"), options.get("buffer_dtype"))}
    return options


def _with_zeros(state: dict[str, Any], param: Tensor, names: list[str]) -> dict[str, Any]:
    """The state with a step count and tensors of these names, zero where they were not there."""
    if "step" not in state:
        state["step"] = torch.zeros(())                       # on the CPU, as torch has it
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part.to_plain() if isinstance(part, CriticalBuffer) else part for name, part in state.items()}


def _bytes(part: Any) -> int:
    return part.untyped_storage().nbytes() if isinstance(part, Tensor) else getattr(part, "nbytes", 0)


def _check(group: Mapping[str, Any], packages: tuple[str, ...]) -> None:
    """ValueError for an option outside its range."""
    for name in ("lr", "eps", "weight_decay", "alpha", "momentum", "kappa"):
        if not 0 <= float(group.get(name, 0.0)) < math.inf:
            raise ValueError(f"{name}={group[name]!r} is not a finite number >= 0")
    for name in ("decay", "critical_test"):
        if not 0 <= group[name] <= 1:
            raise ValueError(f"{name}={group[name]!r} is outside [0, 1]")
    if "betas" in group and (len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"])):
        raise ValueError(f"betas={group['betas']!r} are not two numbers in [0, 1)")
    if isinstance(group["topC"], bool) or not isinstance(group["topC"], int) or group["topC"] < 1:
        raise ValueError(f"topC={group['topC']!r} is not a positive whole number; kappa=0 is the optimizer without a memory")
    if group["aggr"] not in AGGREGATIONS:
        raise ValueError(f"aggr={group['aggr']!r} is none of {', '.join(AGGREGATIONS)}")
    if group["compatible"] not in (None, *packages):
        raise ValueError(f"compatible={group['compatible']!r} is none of {', '.join(packages)}: packages that have this class")
    if group["compatible"] and group["buffer_codec"] not in (None, "float32", "bfloat16"):
        raise ValueError(f"the public packages have no buffer_codec={group['buffer_codec']!r}; leave compatible= away")
