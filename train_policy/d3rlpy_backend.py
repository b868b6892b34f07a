"""d3rlpy as a backend: its DiscreteCQL on the ladder, its IQL and TD3+BC on continuous views, with our trunk inside.

Our trunk, normaliser included, becomes d3rlpy's encoder; d3rlpy's own `fit` trains it; then it is copied back. Action
values over rungs are linear in the trunk's features, so their scaled copy is our rung head, exactly. A continuous actor
is distilled: its choices teach both heads.
"""

import dataclasses
import io
import json
import tempfile
from contextlib import redirect_stdout
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mango.config import NVEC
from mango.networks import PolicyNetwork
from mango_env.adapters import import_d3rlpy, to_d3rlpy
from train_policy.batches import observations_of
from train_policy.distil import adopt_values, distil, nearest_targets
from train_policy.seeding import borrowed_rng

if TYPE_CHECKING:
    from train_policy.offline import Task

TARGET_UPDATES = 100                                     # between copies of DiscreteCQL's target network
ACTION_FEATURES = 128                                    # width where a critic joins features and actions
DISCRETE, CONTINUOUS = ("discrete-cql",), ("iql", "td3+bc")


class Registered(NamedTuple):
    """The classes that d3rlpy knows us by."""

    factory: type[Any]                                   # EncoderFactory with the field `architecture` (JSON)


@cache
def register() -> Registered:
    """Make our encoder known to d3rlpy, once; needed before a `.d3` file with our trunk is loaded."""
    import_d3rlpy()
    from d3rlpy.models.encoders import EncoderFactory, register_encoder_factory
    from d3rlpy.models.torch.encoders import Encoder, EncoderWithAction

    class TrunkEncoder(Encoder):  # type: ignore[misc]
        def __init__(self, architecture: dict[str, Any]) -> None:
            super().__init__()
            self.trunk = PolicyNetwork(**architecture).trunk

        def forward(self, x: Tensor) -> Tensor:
            features: Tensor = self.trunk(x)
            return features

    class TrunkEncoderWithAction(EncoderWithAction):  # type: ignore[misc]
        def __init__(self, architecture: dict[str, Any], action_size: int) -> None:
            super().__init__()
            self.trunk = PolicyNetwork(**architecture).trunk
            self.join = nn.Linear(self.trunk.features_dim + action_size, ACTION_FEATURES)

        def forward(self, x: Tensor, action: Tensor) -> Tensor:
            joined: Tensor = self.join(torch.cat([self.trunk(x), action], 1)).relu()
            return joined

    @dataclasses.dataclass()
    class TrunkFactory(EncoderFactory):  # type: ignore[misc]
        """The trunk of a `PolicyNetwork` as d3rlpy's encoder; the weights are copied in once the algorithm is built."""

        architecture: str = ""

        def create(self, observation_shape: Any) -> TrunkEncoder:
            return TrunkEncoder(json.loads(self.architecture))

        def create_with_action(
            self, observation_shape: Any, action_size: int, discrete_action: bool = False
        ) -> TrunkEncoderWithAction:
            return TrunkEncoderWithAction(json.loads(self.architecture), action_size)

        @staticmethod
        def get_type() -> str:
            return "mango_trunk"

    register_encoder_factory(TrunkFactory)
    return Registered(TrunkFactory)


def build(name: str, network: PolicyNetwork, *, batch_size: int, learning_rate: float, gamma: float, scale: float = 1.0,
          conservatism: float = 1.0, expectile: float = 0.7, seed: int = 0) -> Any:  # fmt: skip
    """A d3rlpy algorithm of our architecture with the network's trunk in every encoder, ready for `fit`.

    `name`: "discrete-cql", "iql" or "td3+bc". Rewards are divided by `scale`.
    """
    if network.trunk.has_memory:
        raise ValueError(f"d3rlpy sees single observations: it takes architecture 'mlp', got {network.name!r}; use iql or awr")
    d3rlpy, factory = import_d3rlpy(), register().factory(architecture=json.dumps(network.architecture))
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "gamma": gamma,
        "reward_scaler": d3rlpy.preprocessing.MultiplyRewardScaler(1 / scale),
    }
    encoders = {"actor_encoder_factory": factory, "critic_encoder_factory": factory}
    rates = {"actor_learning_rate": learning_rate, "critic_learning_rate": learning_rate}
    algos = d3rlpy.algos
    if name == "discrete-cql":
        config = algos.DiscreteCQLConfig(
            learning_rate=learning_rate,
            encoder_factory=factory,
            alpha=conservatism,
            target_update_interval=TARGET_UPDATES,
            **shared,
        )
    elif name == "iql":
        config = algos.IQLConfig(value_encoder_factory=factory, expectile=expectile, **encoders, **rates, **shared)
    elif name == "td3+bc":
        config = algos.TD3PlusBCConfig(**encoders, **rates, **shared)
    else:
        raise ValueError(f"unknown d3rlpy algorithm {name!r}; known: {', '.join(DISCRETE + CONTINUOUS)}")
    algo = config.create(device="cpu:0")
    size = network.architecture["rungs"] if name in DISCRETE else len(NVEC)
    with borrowed_rng(seed):
        algo.create_impl((network.architecture["feature_dim"],), size)
    for trunk in trunks_in(algo):
        trunk.load_state_dict(network.trunk.state_dict())
    return algo


def trunks_in(algo: Any) -> list[nn.Module]:
    """Every copy of our trunk inside a d3rlpy algorithm, targets included."""
    modules = algo.impl.modules.get_torch_modules().values()
    return [part.trunk for module in modules for part in module.modules() if type(part).__name__.startswith("TrunkEncoder")]


def fit(name: str, task: "Task") -> None:
    """Train `task.network` by a d3rlpy algorithm; d3rlpy logs into a temporary folder, and nothing stays of it."""
    args, network = task.args, task.network
    algo = build(
        name,
        network,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        gamma=args.gamma,
        scale=task.scale,
        conservatism=args.conservatism,
        expectile=args.expectile,
        seed=args.seed,
    )
    seen = observations_of(task.training, args.seed)
    per_epoch = min(args.report_every, args.updates)
    done = 0
    with tempfile.TemporaryDirectory() as folder, borrowed_rng(args.seed), redirect_stdout(io.StringIO()):
        buffer = to_d3rlpy(task.training, "rung" if name in DISCRETE else "continuous")
        factory = import_d3rlpy().logging.FileAdapterFactory(root_dir=folder)
        epochs = algo.fitter(
            buffer,
            n_steps=args.updates // per_epoch * per_epoch,
            n_steps_per_epoch=per_epoch,
            logger_adapter=factory,
            show_progress=False,
            save_interval=args.updates,
        )
        for _, metrics in epochs:
            done += per_epoch
            bring_back(algo, network, seen, seed=args.seed)
            task.report(done, {key: float(value) for key, value in metrics.items() if not key.startswith("time_")})


def bring_back(algo: Any, network: PolicyNetwork, observations: Tensor, *, seed: int = 0) -> None:
    """Copy what a d3rlpy algorithm has learned into `network`: the trunk exactly, the heads from its values or actor."""
    modules = algo.impl.modules
    if hasattr(modules, "policy"):
        network.trunk.load_state_dict(modules.policy._encoder.trunk.state_dict())
        with torch.no_grad():
            wanted: Tensor = modules.policy(observations).squashed_mu.clamp(-1, 1)            # (N, 7)
        rungs, knobs = nearest_targets(wanted)
        distil(network, observations, rungs=rungs, knobs=knobs, seed=seed)
        return
    network.trunk.load_state_dict(modules.q_funcs[0]._encoder.trunk.state_dict())
    head = modules.q_funcs[0]._fc
    adopt_values(network, head.weight.detach(), head.bias.detach(), observations, seed=seed)


def network_of(algo: Any) -> PolicyNetwork:
    """The network of a loaded DiscreteCQL (or other discrete value algorithm) with our trunk: rung logits are its Q.

    Raises ValueError for other algorithms: a continuous actor has no rungs, it must be distilled on observations
    (`bring_back`).
    """
    modules = algo.impl.modules
    values: Any = getattr(modules, "q_funcs", [None])
    if hasattr(modules, "policy") or not hasattr(values[0], "_fc") or not hasattr(values[0]._encoder, "trunk"):
        raise ValueError(
            f"the d3rlpy algorithm is {type(algo).__name__}; only discrete action values on our trunk (DiscreteCQL by "
            "train_policy.d3rlpy_backend) become a policy without data"
        )
    network = PolicyNetwork(**json.loads(algo.config.encoder_factory.architecture))
    network.trunk.load_state_dict(values[0]._encoder.trunk.state_dict())
    network.rung_head.load_state_dict(values[0]._fc.state_dict())
    return network.eval()
