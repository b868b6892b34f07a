"""Classification as a workload: any model on any labelled examples."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango_env.workloads.data import Batches, check_positive, drawing, evaluating, load_state, save_state
from mango_env.workloads.initialise import build

Augmentation = Callable[[Any, torch.Generator], Tensor]                        # chosen examples to pixels, (B, C, H, W) uint8
EVALUATION_BATCH = 500                                                         # examples per forward pass of evaluate()


class Examples(Protocol):
    """A tensor (N, ...), or anything else that indices (B,) and slices choose from."""

    def __getitem__(self, index: Any, /) -> Any: ...


class LabelledData(Protocol):
    """Examples with their classes; `Shared` by copies of a workload."""

    @property
    def train_x(self) -> Examples: ...

    @property
    def train_y(self) -> Tensor: ...                                           # (N,) int64

    @property
    def val_x(self) -> Examples: ...

    @property
    def val_y(self) -> Tensor: ...                                             # (M,) int64

    def inputs(self, examples: Any, weight: Tensor) -> Any:
        """What a model takes in whose parameters are of the device and dtype of `weight`."""
        ...


class Classification:
    """A classifier trained by cross-entropy on batches in a random order that is new in every epoch.

    Batches follow the model to its device and dtype. `val_loss` and `val_accuracy` are taken on all of `data.val_x`.
    `std` and `embedding_std` are those of `initialise`. A `stochastic` model draws in its forward pass (dropout and the
    like): then from the workload's generator, so that it repeats with the seed.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        data: LabelledData,
        seed: int,
        *,
        steps: int,
        batch: int,
        lr: float,
        augment: Augmentation | None = None,
        std: float | None = None,
        embedding_std: float = 0.02,
        evaluation_batch: int = EVALUATION_BATCH,
        stochastic: bool = False,
    ) -> None:
        check_positive(steps=steps, batch=batch, evaluation_batch=evaluation_batch)
        self._generator = torch.Generator().manual_seed(seed)
        self.model = build(factory, self._generator, std, embedding_std)
        self.steps = steps
        self.batch = batch
        self.lr = lr
        self.augment = augment
        self.samples_per_step = batch
        self._evaluation_batch = evaluation_batch
        self._stochastic = stochastic
        self._data = data
        self._batches = Batches(len(data.train_y), batch, self._generator)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every training example once; an incomplete last batch is dropped."""
        return len(self._data.train_y) // self.batch

    def loss(self) -> Tensor:
        index = self._batches.next()                                           # (B,)
        examples = self._data.train_x[index]                                   # (B, ...)
        if self.augment is not None:
            examples = self.augment(examples, self._generator)
        with drawing(self.model, self._generator, self._stochastic):
            return self._cross_entropy(examples, self._data.train_y[index])[0]

    def evaluate(self) -> dict[str, float]:
        total, correct, count = 0.0, 0, len(self._data.val_y)
        with evaluating(self.model):
            for start in range(0, count, self._evaluation_batch):
                part = slice(start, start + self._evaluation_batch)
                labels = self._data.val_y[part]
                loss, logits = self._cross_entropy(self._data.val_x[part], labels)
                total += float(loss) * len(labels)
                correct += int((logits.argmax(1).cpu() == labels).sum())
        return {"val_loss": total / count, "val_accuracy": correct / count}

    def state_dict(self) -> dict[str, Any]:
        return save_state(self._generator, self._batches)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(state, self._generator, self._batches)

    def _cross_entropy(self, examples: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        weight = next(self.model.parameters())
        logits = self.model(self._data.inputs(examples, weight)).float()       # (B, classes)
        return F.cross_entropy(logits, labels.to(weight.device)), logits
