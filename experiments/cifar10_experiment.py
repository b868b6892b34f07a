"""CIFAR-10 as an experiment to extend: override `setup_data` or `create_model`, then `run()`.

    python -m experiments.cifar10_experiment --optimizer mango_learned --steps 200 --tiny
"""

import argparse
import json
import sys
from typing import Any

from torch import nn

from mango_env.workloads.cifar10 import (
    CLASSES,
    SOURCE,
    TINY_SOURCE,
    ResidualNetwork,
    crop_and_flip,
    load_cifar10,
    load_cifar10_tiny,
)
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import ImageData, data_file
from train_policy.run_study import Args, run_method
from train_policy.study_methods import methods


class CIFAR10Experiment:
    """Trains a classifier with one of the methods of `mango run`.

    `setup_data` sets `self.data` (an `ImageData`), `create_model` gives the network; a subclass may replace either.
    """

    data: ImageData

    def __init__(
        self,
        optimizer: str = "mango_learned",
        *,
        policy: str = "demo",
        budget: float | str = 0.25,
        steps: int = 1000,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        seed: int = 0,
        tiny: bool = False,
    ) -> None:
        self.method, self.seed, self.tiny = optimizer, seed, tiny
        self.steps, self.batch_size, self.learning_rate = steps, batch_size, learning_rate
        self.policy, self.budget = policy, budget

    def setup_data(self) -> None:
        """CIFAR-10 from MANGO_DATA, or 2,000 images of it with `tiny`."""
        if self.tiny:
            self.data = load_cifar10_tiny(data_file("cifar10_tiny.npz", "cifar10", TINY_SOURCE), 500)
        else:
            train, test = (data_file(f"cifar10_{part}_jpeg.npz", "cifar10", SOURCE) for part in ("train", "test"))
            self.data = load_cifar10(train, test, 2000)

    def create_model(self) -> nn.Module:
        """A small residual network."""
        return ResidualNetwork(16, 1, CLASSES)

    def workload(self, seed: int) -> Classification:
        """One seeded training run of the model on the data."""
        return Classification(
            self.create_model,
            self.data,
            seed,
            steps=self.steps,
            batch=self.batch_size,
            lr=self.learning_rate,
            augment=crop_and_flip,
        )

    def run(self) -> dict[str, Any]:
        """Train once; a row with held-out loss and accuracy, bytes and decisions."""
        table = methods(self.policy)
        if self.method not in table:
            raise ValueError(f"unknown optimizer {self.method!r}; known: {', '.join(table)}")
        self.setup_data()
        args = Args(workload=self.workload, policy=self.policy, budget=self.budget)
        return run_method(args, table[self.method], self.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="mango_learned")
    parser.add_argument("--policy", default="demo")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    given = vars(parser.parse_args())
    try:
        row = CIFAR10Experiment(given.pop("optimizer"), **given).run()
    except (ValueError, OSError) as error:
        sys.exit(f"cifar10_experiment: {error}")
    print(json.dumps({key: value for key, value in row.items() if not isinstance(value, list)}, indent=1))


if __name__ == "__main__":
    main()
