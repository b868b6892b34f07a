"""MANGO: an optimizer that stores its state compressed, layer by layer as a policy decides, inside a hard byte budget."""

from mango.allocators import ErrorConstrainedPolicy, SensitivityPolicy
from mango.codecs import CODECS, Encoded
from mango.config import FULL, KNOBS, KNOBS_VERSION, LADDER, CompressionConfig, Ladder
from mango.networks import CompressionPolicyNet, PolicyNetwork
from mango.optimizer import MANGO, Decision
from mango.policies import (
    POLICIES,
    AdaptiveCompressionPolicy,
    AdaptivePolicy,
    FixedCompressionPolicy,
    FixedPolicy,
    HoldPolicy,
    RandomPolicy,
    ScheduledPolicy,
    WaterFillingPolicy,
)
from mango.policy_file import freeze, load_policy, policy_dir

__version__ = "0.1.0"
__all__ = [
    "CODECS",
    "FULL",
    "KNOBS",
    "KNOBS_VERSION",
    "LADDER",
    "MANGO",
    "POLICIES",
    "AdaptiveCompressionPolicy",
    "AdaptivePolicy",
    "CompressionConfig",
    "CompressionPolicyNet",
    "Decision",
    "Encoded",
    "ErrorConstrainedPolicy",
    "FixedCompressionPolicy",
    "FixedPolicy",
    "HoldPolicy",
    "Ladder",
    "PolicyNetwork",
    "RandomPolicy",
    "ScheduledPolicy",
    "SensitivityPolicy",
    "WaterFillingPolicy",
    "freeze",
    "load_policy",
    "policy_dir",
]
