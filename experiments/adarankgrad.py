"""AdaRankGrad: AdamW in subspaces of the gradient whose rank falls as training goes on. Nothing to run by itself.

Refael et al. 2025, "AdaRankGrad: Adaptive Gradient-Rank and Moments for Memory-Efficient LLMs Training and Fine-Tuning"
(arXiv 2410.17881). There is no kept package of it. What the paper projects are the matrices of the blocks; embedding, head
and vectors have dense AdamW.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from mango.layers import describe
from mango.lowrank import adamw_in_subspace, energies, find, matricise, project, rank_schedule, transport
from mango.rules import NOT_FOR_MUON, adamw_update

RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)   # the menu
BETAS, EPS = (0.9, 0.999), 1e-8
SCHEDULES = ("falling-SHARE", "free-SHARE", "planned-FIRST-LAST")


def planned_rank(turn: int, turns: int, first: int, last: int) -> int:
    """The rank of a turn of the subspace out of `turns`: from first to last, each turn by the same factor.

    >>> [planned_rank(turn, 5, 8, 2) for turn in range(6)]
    [8, 6, 4, 3, 2, 2]
    """
    if not 1 <= last <= first:
        raise ValueError(f"ranks {first} to {last} do not fall from one positive rank to another")
    share = min(1.0, turn / max(1, turns - 1))
    return round(float(first * (last / first) ** share))


class AdaRankGrad(Optimizer):
    """AdamW in subspaces for the matrices named hidden, dense for the rest; float32.

    `schedule` says which rank a subspace gets, which is sought anew every `every` steps; moments are carried over.
    "falling-0.1": the least rank that loses at most a tenth of the gradient's energy, never above the one in force before
    (the paper's section 3); "free-0.05": the same for a twentieth, and it may rise; "planned-8-2": from 8 to 2 over `steps`.

    >>> model = torch.nn.Linear(16, 8)
    >>> optimizer = AdaRankGrad(model.named_parameters(), lr=0.01, hidden={"weight"}, schedule="falling-0.1", every=10, seed=0)
    >>> model(torch.ones(1, 16)).sum().backward(); optimizer.step()
    >>> optimizer.ranks()                               # this gradient has rank one
    {'weight': 1}
    >>> optimizer.state_bytes()                         # projector (8, 1), moments (1, 16), moments of the bias
    224
    """

    def __init__(
        self, params: Iterable[tuple[str, Parameter]], *, lr: float, hidden: set[str], schedule: str, every: int, seed: int,
        scale: float = 1.0, steps: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr})
        self.how, *numbers = schedule.split("-")
        if self.how not in ("falling", "free", "planned") or len(numbers) != (2 if self.how == "planned" else 1):
            raise ValueError(f"schedule={schedule!r} is none of {', '.join(SCHEDULES)}")
        if self.how == "planned" and steps < 1:
            raise ValueError(f"schedule={schedule!r} is over the steps of a run: give steps=")
        if every < 1:
            raise ValueError(f"every={every} is not a positive number of steps")
        self.numbers = tuple(float(number) for number in numbers)
        self.hidden, self.every, self.scale, self.turns = hidden, every, scale, (steps - 1) // every + 1
        self.generator, self.steps = Generator().manual_seed(seed), 0

    def _named(self) -> list[tuple[str, Parameter, float]]:
        groups = self.param_groups
        return [(n, p, float(g["lr"])) for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for name, param, lr in self._named():
            if param.grad is None:
                continue
            state = self.state[param]
            if name in self.hidden:
                if not state or self.steps % self.every == 0:
                    self._turn(state, matricise(param.grad))
                adamw_in_subspace(param, param.grad, **state, **self._hyper(lr), scale=self.scale)
            else:
                if not state:
                    state |= {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
                adamw_update(param, param.grad, **state, **self._hyper(lr))
        self.steps += 1

    def _hyper(self, lr: float) -> dict[str, Any]:
        return {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "step": self.steps + 1}

    def _turn(self, state: dict[str, Tensor], matrix: Tensor) -> None:
        """A new subspace of the gradient (m, n), of the rank that the schedule says, with the moments carried over."""
        old = state.get("projector")
        widest = [rank for rank in RANKS if rank <= len(matrix)][-1]
        if self.how == "planned":
            first, last = (int(number) for number in self.numbers)
            rank = min(planned_rank(self.steps // self.every, self.turns, first, last), len(matrix))
            found = find(matrix, rank, self.generator)                               # (m, rank)
        else:
            now = widest if old is None or self.how == "free" else old.shape[1]
            found = find(matrix, now, self.generator)                                # (m, now)
            energy, total = energies(matrix, found)
            menu = [rank for rank in RANKS if rank <= len(matrix)]
            rank = rank_schedule(energy.tolist(), float(total), menu, lost=self.numbers[0], now=now)
        inside = project(found, matrix)
        leading = torch.linalg.eigh(inside @ inside.T).eigenvectors[:, -rank:]       # find's columns need not be in order
        state["projector"] = found @ leading                                         # (m, rank)
        if old is None:
            state["exp_avg"], state["exp_avg_sq"] = matrix.new_zeros(2, rank, matrix.shape[1]).unbind()
        else:
            turn = state["projector"].T @ old
            state["exp_avg"], state["exp_avg_sq"] = transport(state["exp_avg"], state["exp_avg_sq"], turn)

    def ranks(self) -> dict[str, int]:
        """Ranks in force, by parameter."""
        return {name: self.state[p]["projector"].shape[1] for name, p, _ in self._named() if "projector" in self.state[p]}

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for state in self.state.values() for t in state.values())


def hidden_names(named: Sequence[tuple[str, Tensor]]) -> set[str]:
    """Names of the matrices that low-rank methods project and Muon makes orthogonal: neither embedding nor head."""
    layers = describe([name for name, _ in named], [tuple(p.shape) for _, p in named])
    return {layer.name for layer in layers if len(layer.shape) == 2 and layer.kind not in NOT_FOR_MUON}


def hidden_matrices(model: Module) -> set[str]:
    """The same of a model."""
    return hidden_names(list(model.named_parameters()))
