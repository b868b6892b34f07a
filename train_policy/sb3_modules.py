"""The classes that Stable-Baselines3 needs to train a `PolicyNetwork`. Importing this module imports SB3: do it lazily.

They live at module level, so that an SB3 zip refers to them by name and `policy_kwargs` of rl-zoo3 can name them.
"""

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from mango.networks import FactoredCategorical, PolicyNetwork


class TrunkExtractor(BaseFeaturesExtractor):
    """Our normaliser and trunk as SB3's features extractor. Observations (B, 64) to features (B, features_dim)."""

    def __init__(self, observation_space: spaces.Box, architecture: dict[str, Any]) -> None:
        trunk = PolicyNetwork(**architecture).trunk
        super().__init__(observation_space, trunk.features_dim)
        self.architecture = dict(architecture)
        self.trunk = trunk

    def forward(self, observations: Tensor) -> Tensor:
        features: Tensor = self.trunk(observations)
        return features


class AnchoredPolicy(ActorCriticPolicy):
    """Actor and critic whose entropy term is `entropy_weight * H(pi) - kl_weight * KL(pi || reference)`.

    PPO maximises whatever `evaluate_actions` returns as entropy (with `ent_coef=1`), so the anchor needs no change to
    its training loop. Without a reference it is SB3's own policy. The reference is not part of a saved zip.
    """

    pi_features_extractor: TrunkExtractor
    vf_features_extractor: TrunkExtractor
    action_net: nn.Linear
    value_net: nn.Linear
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    reference: PolicyNetwork | None = None
    head: str = "rung"

    def anchor(self, reference: PolicyNetwork, head: str, *, kl_weight: float, entropy_weight: float) -> None:
        """Hold the policy near `reference` (a frozen copy of the network that training starts from)."""
        # object.__setattr__: a registered submodule would be trained and saved with the policy.
        object.__setattr__(self, "reference", reference)
        self.head, self.kl_weight, self.entropy_weight = head, kl_weight, entropy_weight

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        if self.reference is None or entropy is None:
            return values, log_prob, entropy
        with torch.no_grad():
            anchor = self.reference.distribution(self.reference(obs), self.head)
        latent = self.mlp_extractor.forward_actor(self.pi_features_extractor(obs))
        kl = FactoredCategorical(self.action_net(latent), anchor.nvec).kl(anchor)
        return values, log_prob, self.entropy_weight * entropy - self.kl_weight * kl
