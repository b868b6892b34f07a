"""A workload of one's own: everything that MANGO's environments, evaluation and `deploy/verify.py` need of a training job.

    python deploy/verify.py --policy water-filling --workload deploy/custom_workload.py:spirals
    mango evaluate --policy water-filling --workload deploy/custom_workload.py:spirals --budgets 0.125 --seeds 3

A workload is a callable `f(seed)` that returns an object with a `model`, a number of `steps`, `loss()` and `evaluate()`.
Copy this file, put your own model and data in its place, and keep the three promises in the comments.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango_env.workloads import initialise

ARMS = 3
VAL_POINTS = 600


class Spirals:
    """Tell from a point in the plane on which of three noisy spiral arms it lies."""

    def __init__(self, seed: int, *, steps: int = 300, batch: int = 128, width: int = 64) -> None:
        # Promise 1: everything random comes from one generator of the workload's own, so that a seed names a run.
        # `initialise` draws the weights from it; without it they would come from torch's global generator.
        self.generator = torch.Generator().manual_seed(seed)
        # Tensors of 1,024 entries or more are compressed, each as a policy decides; smaller ones keep full precision.
        self.model = initialise(
            nn.Sequential(
                nn.Linear(2, width), nn.ReLU(),
                nn.Linear(width, width), nn.ReLU(),
                nn.Linear(width, width), nn.ReLU(),
                nn.Linear(width, ARMS),
            ),
            self.generator,
        )  # fmt: skip
        self.steps = steps                                                     # optimizer steps of a full run
        self.batch = batch
        self.lr = 5e-3                                                         # optional: a good AdamW learning rate
        # The held-out part is the same for every seed, so that `val_loss` can be compared between runs.
        self.val_x, self.val_y = draw(VAL_POINTS, torch.Generator().manual_seed(2**31))

    def loss(self) -> Tensor:
        """The training loss of the next batch, with its graph: whoever trains calls `backward()` on it."""
        x, y = draw(self.batch, self.generator)
        return F.cross_entropy(self.model(x), y)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """At least `val_loss`. Promise 2: it changes nothing, neither weights nor mode nor generator."""
        # A model with dropout or batch norm is put into eval mode here and back into its former mode afterwards.
        logits = self.model(self.val_x)
        accuracy = (logits.argmax(1) == self.val_y).float().mean()
        return {"val_loss": float(F.cross_entropy(logits, self.val_y)), "val_accuracy": float(accuracy)}

    # Optional. Promise 3: loading what was saved continues with the very same batches. The model is saved by others.
    # Without this pair a workload is saved by copying all of it, which costs memory where it holds a data set.
    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (count, 2) float32 and their arms (count,) int64."""
    arm = torch.randint(ARMS, (count,), generator=generator)
    radius = torch.rand(count, generator=generator).sqrt()
    angle = 2 * torch.pi * (arm / ARMS + 0.75 * radius)
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return points + 0.03 * torch.randn(count, 2, generator=generator), arm


def spirals(seed: int) -> Spirals:
    """What is named on the command line: `deploy/custom_workload.py:spirals`."""
    return Spirals(seed)
