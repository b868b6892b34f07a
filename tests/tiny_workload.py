"""A workload for tests whose run costs milliseconds: two small layers fit a random linear map."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Regression:
    """Dropout draws from torch's global generator, as users' models do."""

    steps = 12

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.2), nn.Tanh(), nn.Linear(32, 32))
        self.target = torch.randn(32, 32, generator=self.generator) / 6
        self.held_out = torch.randn(64, 32, generator=self.generator)

    def loss(self) -> Tensor:
        return self._error(torch.randn(16, 32, generator=self.generator))

    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            loss = float(self._error(self.held_out))
        self.model.train()
        return {"val_loss": loss}

    def _error(self, x: Tensor) -> Tensor:
        wrong: Tensor = self.model(x) - x @ self.target
        return wrong.square().mean()


def tiny(seed: int) -> Regression:
    return Regression(seed)


class Exploding(Regression):
    def loss(self) -> Tensor:
        return super().loss() * float("nan")


def exploding(seed: int) -> Exploding:
    return Exploding(seed)


class Plain(Regression):
    """Nothing random in the model, so runs of it can be batched."""

    batchable = True

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 32, generator=self.generator)
        return x, x @ self.target

    def batch_loss(self, model: Callable[..., Tensor], *data: Tensor) -> Tensor:
        wrong: Tensor = model(data[0]) - data[1]
        return wrong.square().mean()

    def loss(self) -> Tensor:
        return self.batch_loss(self.model, *self.next_batch())


def plain(seed: int) -> Plain:
    return Plain(seed)
