"""The published usage snippets run as written. Only `YourModel`, `dataloader` and the reward's inputs are the user's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TRAINING_LOOP = """
from mango import MANGO, AdaptiveCompressionPolicy
policy = AdaptiveCompressionPolicy()
optimizer = MANGO(model.parameters(), lr=1e-3, policy_net=policy, error_feedback=True)
for batch in dataloader:
    optimizer.zero_grad()
    loss = model(batch)
    loss.backward()
    optimizer.step()
"""

ONLINE_LEARNING = """
from mango import MANGO, CompressionPolicyNet
from mango.ppo_trainer import PPOTrainer
policy_net = CompressionPolicyNet(feature_dim=64, hidden_dim=128, num_layers=2)
ppo_trainer = PPOTrainer(policy_net)
optimizer = MANGO(model.parameters(), lr=1e-3, policy_net=policy_net, policy_update_freq=100)
for step, batch in enumerate(dataloader):
    optimizer.zero_grad()
    loss = model(batch)
    loss.backward()
    features = optimizer.collect_gradient_features()
    compression_config = optimizer.get_compression_config()
    reward = compute_reward(loss, memory_usage, compression_error)
    ppo_trainer.collect_experience(features, compression_config, reward)
    optimizer.step()
    if step % 1000 == 0:
        ppo_stats = ppo_trainer.update_policy()
policy_stats = ppo_trainer.get_training_summary()
print(f"Policy loss: {policy_stats['recent_policy_loss']:.4f}")   # also before the first update
print(f"Entropy: {policy_stats['recent_entropy']:.4f}")
"""

CUSTOM_POLICY_AND_COMPRESSOR = """
class MyCustomPolicy:
    def __call__(self, features):
        return {'gradient_bits': 16, 'momentum_bits': 16, 'sparsity_ratio': 0.1}
    def reset_hidden_state(self):
        pass
optimizer = MANGO(model.parameters(), policy_net=MyCustomPolicy())

from mango.compression import GradientCompressor
class MyCustomCompressor(GradientCompressor):
    def compress(self, tensor, bits, sparsity_ratio, importance_scores=None):
        compressed_tensor = your_compression_function(tensor, bits)
        compression_error = tensor - compressed_tensor
        return compressed_tensor, compression_error
"""

MONITORS = """
memory_stats = optimizer.get_memory_usage()
print(f"Peak memory: {memory_stats['peak_memory_gb']:.2f} GB")
comp_stats = optimizer.get_compression_stats()
print(f"Compression ratio: {comp_stats['avg_compression_ratio']:.1f}x")
"""

EXPERIMENT = """
from experiments.cifar10_experiment import CIFAR10Experiment
class ImageNetExperiment(CIFAR10Experiment):
    def setup_data(self): ...
    def create_model(self): return YourImageNetModel()
"""

POLICY_NETWORK = """
CompressionPolicyNet(feature_dim=64, hidden_dim=128, num_layers=2, num_parameter_groups=1, dropout=0.1)
"""


class YourModel(nn.Module):
    """A model whose forward pass gives the loss of a batch, as the snippets assume."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden, self.out = nn.Linear(48, 64), nn.Linear(64, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 7)

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.out(torch.tanh(self.hidden(batch)))
        return (output - batch[:, :4]).square().mean()


def batches(count: int, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(16, 48, generator=generator)


def run(snippet: str, **names: Any) -> dict[str, Any]:
    """Execute a snippet with the user's names in it; gives all names afterwards."""
    space: dict[str, Any] = {"model": YourModel(), "dataloader": batches(30), "__name__": "snippet", **names}
    exec(compile(snippet, "<snippet>", "exec"), space)
    return space


def test_a22_the_training_loop_with_the_adaptive_policy_runs_as_written() -> None:
    first = YourModel()(next(batches(1))).item()
    names = run(TRAINING_LOOP, dataloader=batches(250))
    assert names["loss"].item() < first
    optimizer = names["optimizer"]
    assert optimizer.applied != [type(optimizer.applied[0])()] * len(optimizer.applied)
    assert optimizer.state_bytes() <= optimizer.memory_budget


def test_c10_the_policy_learns_online_while_the_model_trains_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    def compute_reward(loss: Tensor, memory_usage: float, compression_error: float) -> float:
        return -loss.item() - memory_usage - compression_error

    user = {"compute_reward": compute_reward, "memory_usage": 0.5, "compression_error": 0.01}
    names = run(ONLINE_LEARNING, dataloader=batches(1001), **user)
    assert torch.isfinite(torch.tensor([float(v) for v in names["ppo_stats"].values()])).all()
    printed = capsys.readouterr().out
    assert "Policy loss: " in printed and "Entropy: " in printed and "nan" not in printed


def test_c16_the_monitors_of_the_policy_answer_before_the_first_update() -> None:
    from mango import CompressionPolicyNet
    from mango.ppo_trainer import PPOTrainer

    summary = PPOTrainer(CompressionPolicyNet(feature_dim=64, hidden_dim=128, num_layers=2)).get_training_summary()
    assert f"{summary['recent_policy_loss']:.4f} {summary['recent_entropy']:.4f}" == "0.0000 0.0000"


def test_a24_a_custom_policy_object_is_asked_and_its_answer_stays_in_force_as_written() -> None:
    from mango import MANGO

    names = run(CUSTOM_POLICY_AND_COMPRESSOR, MANGO=MANGO, your_compression_function=lambda tensor, bits: tensor)
    optimizer, model = names["optimizer"], names["model"]
    log = []
    for batch in batches(130):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        log.append({(c.gradient_bits, c.momentum_bits, c.sparsity) for c in optimizer.applied})
    assert log[98] == {(32, 32, 0.0)}                    # nobody was asked yet: policy_update_freq is 100
    assert log[99:] == [{(16, 16, 0.1)}] * 31


def test_a25_h9_a_custom_compressor_is_passed_in_and_called() -> None:
    from mango import MANGO, CompressionConfig

    calls: list[tuple[int, int]] = []

    def your_compression_function(tensor: Tensor, bits: int) -> Tensor:
        calls.append((tensor.numel(), bits))
        return tensor.sign() * tensor.abs().mean()

    names = run(CUSTOM_POLICY_AND_COMPRESSOR, MANGO=MANGO, your_compression_function=your_compression_function)
    model = YourModel()
    config = CompressionConfig(gradient_bits=4)
    optimizer = MANGO(model.parameters(), policy=config, compressor=names["MyCustomCompressor"]())
    model(next(batches(1))).backward()
    optimizer.step()
    assert (64 * 48, 4) in calls


def test_g1_g2_the_memory_and_compression_monitors_run_as_written_and_tell_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    from mango import MANGO, CompressionConfig

    model = YourModel()
    optimizer = MANGO(model.parameters(), policy=CompressionConfig(momentum_bits=8, variance_bits=8))
    for batch in batches(3):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    names = run(MONITORS, optimizer=optimizer)
    assert capsys.readouterr().out.startswith("Peak memory: ")
    true_ratio = optimizer.adamw_bytes / optimizer.state_bytes()
    assert names["comp_stats"]["avg_compression_ratio"] == pytest.approx(true_ratio, rel=0.25)
    assert names["memory_stats"]["peak_memory_gb"] * 1e9 >= optimizer.state_bytes()


def test_c1_the_policy_network_has_the_published_constructor() -> None:
    from mango import CompressionPolicyNet

    run(POLICY_NETWORK, CompressionPolicyNet=CompressionPolicyNet)


def test_g3_average_bits_sparsity_and_changes_agree_with_a_scripted_policy_by_hand() -> None:
    from mango import FULL, MANGO, CompressionConfig

    class Scripted:
        """Full precision for 25 steps, then 8-bit momentum, then 4-bit with half of the gradient dropped, then as before."""

        def __init__(self) -> None:
            self.script = [CompressionConfig(momentum_bits=8), CompressionConfig(momentum_bits=4, sparsity=0.5), FULL, FULL]

        def act(self, obs: Tensor) -> CompressionConfig:
            return self.script.pop(0)

        def reset(self) -> None:
            """The script is played once."""

    model = YourModel()                                  # one layer: hidden.weight; out.weight has 256 entries
    optimizer = MANGO(model.parameters(), policy=Scripted(), policy_update_freq=25, memory_budget=4.0)
    assert len(optimizer.layers) == 1
    for batch in batches(100):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    stats = optimizer.get_compression_stats()
    assert stats["avg_momentum_bits"] == pytest.approx((32 + 8 + 4 + 32) / 4)
    assert stats["avg_sparsity"] == pytest.approx(0.5 / 4)
    assert stats["avg_gradient_bits"] == 32
    assert stats["changes"] == 3                         # down, further down, back up; the last decision changes nothing


def test_f12_an_experiment_on_other_data_is_a_subclass_as_written() -> None:
    from mango_env.workloads.data import ImageData

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (96, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = (pixels[:, 0].float().mean((1, 2)) > 127.5).long()
    level = torch.full((3, 1, 1), 127.5)
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 2))  # noqa: E731
    experiment = run(EXPERIMENT, YourImageNetModel=network)["ImageNetExperiment"]("mango_adaptive", steps=12, batch_size=16)
    experiment.data = ImageData(pixels[:64], labels[:64], pixels[64:], labels[64:], level, level, 2)
    row = experiment.run()
    assert row["steps"] == 12 and row["val_loss"] > 0 and row["state_bytes_peak"] <= row["budget_bytes"]
