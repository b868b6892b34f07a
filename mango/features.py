"""The observation of one layer: its features, in order, with meaning, unit and range.

The table is the contract between the optimizer, the trajectories and the policies. Its hash travels in every file;
loading a file of another schema is refused. Every value is clipped into its range, so the observation space is finite.
"""

import hashlib
import json
from dataclasses import dataclass

KINDS = ("linear", "conv", "embedding", "norm", "attention_in", "attention_out", "mlp_up", "mlp_down", "recurrent", "head")
RULES = ("adamw", "sgd", "lion", "muon")


@dataclass(frozen=True, slots=True)
class Feature:
    name: str
    meaning: str
    unit: str
    low: float
    high: float


LAYER_FEATURES: tuple[Feature, ...] = (
    # the gradient
    Feature("grad_norm", "l2 norm of the gradient", "log10", -20, 20),
    Feature("grad_rms", "root mean square of the gradient", "log10", -20, 20),
    Feature("grad_trend", "gradient norm over its running mean (decay 0.99)", "ln", -10, 10),
    Feature("log_abs_mean", "mean of ln|g| over a sample (log-normal fit)", "ln", -50, 50),
    Feature("log_abs_std", "standard deviation of ln|g| over a sample (log-normal fit)", "ln", 0, 20),
    Feature("grad_crest", "largest |g| over its root mean square, over a sample", "log10", 0, 10),
    Feature("grad_variance", "mean variance of an entry over the interval's gradients", "log10", -40, 40),
    Feature("noise_scale", "tr(Sigma) / |G|^2 over the interval (McCandlish et al. 2018, app. A)", "log10", -10, 10),
    Feature("grad_cosine", "cosine of successive gradients, over a sample, interval mean", "1", -1, 1),
    Feature("momentum_alignment", "cosine of first moment and gradient", "1", -1, 1),
    Feature("stable_rank", "|G|_F^2 / |G|_2^2 over its largest possible value", "1", 0, 1),
    # the update
    Feature("update_ratio", "norm of the last update over norm of the weights", "log10", -20, 10),
    Feature("weight_rms", "root mean square of the weights", "log10", -20, 20),
    Feature("curvature", "loss change over squared distance moved in a step, sign(x) log10(1 + |x|)", "log10", -20, 20),
    # what compression would do: relative l2 error of the stored moment, over a sample
    Feature("error_momentum_8", "relative error of m / sqrt(v) with the first moment at 8 bits", "log10", -10, 2),
    Feature("error_momentum_4", "relative error of m / sqrt(v) with the first moment at 4 bits", "log10", -10, 2),
    Feature("error_momentum_2", "relative error of m / sqrt(v) with the first moment at 2 bits", "log10", -10, 2),
    Feature("error_variance_8", "relative error of m / sqrt(v) with the second moment at 8 bits", "log10", -10, 2),
    Feature("error_variance_4", "relative error of m / sqrt(v) with the second moment at 4 bits", "log10", -10, 2),
    Feature("error_variance_0", "relative error of m / sqrt(v) with the second moment as factors", "log10", -10, 2),
    Feature("error_rank_1", "fraction of the norm of m / sqrt(v) outside its best rank-1 subspace", "1", 0, 1),
    Feature("error_rank_8", "fraction of the norm of m / sqrt(v) outside its best rank-8 subspace", "1", 0, 1),
    # what compression does now
    Feature("compression_error", "relative error that storing the state added at the last probe", "log10", -10, 2),
    Feature("residual_ratio", "norm of the error-feedback residual over norm of the gradient", "log10", -10, 4),
    Feature("gradient_bits", "gradient bits in force", "log2 / 5", 0, 1),
    Feature("momentum_bits", "first-moment bits in force (of Q where rank > 0; 0: none)", "log2(1 + bits) / 5.05", 0, 1),
    Feature("variance_bits", "second-moment bits in force (0: factors)", "log2(1 + bits) / 5.05", 0, 1),
    Feature("sparsity", "fraction of gradient entries dropped", "1", 0, 1),
    Feature("rank", "rank in force over the largest possible (1: full)", "1", 0, 1),
    Feature("bytes_per_param", "state bytes per parameter in force over AdamW's eight", "1", 0, 4),
    # what the layer is
    Feature("depth", "position among the model's layers", "fraction", 0, 1),
    Feature("numel", "number of parameters", "log10", 0, 12),
    Feature("aspect", "larger over smaller side of the layer as a matrix", "log10", 0, 12),
    Feature("share", "this layer's part of all parameters", "fraction", 0, 1),
    Feature("importance", "gradient norm over the largest of all layers", "1", 0, 1),
    *(Feature(f"kind_{kind}", f"1 for layers of the kind {kind}", "one-hot", 0, 1) for kind in KINDS),
    *(Feature(f"rule_{rule}", f"1 for layers that the rule {rule} moves", "one-hot", 0, 1) for rule in RULES),
)
GLOBAL_FEATURES: tuple[Feature, ...] = (
    Feature("progress", "steps done over steps in all (0 where unknown)", "fraction", 0, 1),
    Feature("loss", "training loss, interval mean", "ln", -20, 20),
    Feature("loss_slope", "change of the loss over the last interval, relative", "1", -10, 10),
    Feature("lr", "learning rate", "log10", -10, 2),
    Feature("lr_ratio", "learning rate over its largest so far", "1", 0, 1),
    Feature("budget_per_param", "memory budget per parameter over AdamW's eight bytes", "log2", -10, 4),
    Feature("budget_pressure", "state bytes in use over the budget", "1", 0, 2),
    Feature("price", "marginal score per byte of the last allocation", "log10", -20, 20),
    Feature("peak_memory", "peak device memory since the last decision over the device's memory (0 without one)", "1", 0, 1),
    Feature("mean_grad_rms", "mean of grad_rms over layers", "log10", -20, 20),
    Feature("std_grad_rms", "standard deviation of grad_rms over layers", "log10", 0, 20),
    Feature("mean_noise_scale", "mean of noise_scale over layers", "log10", -10, 10),
    Feature("mean_momentum_alignment", "mean of momentum_alignment over layers", "1", -1, 1),
    Feature("mean_error_momentum_4", "mean of error_momentum_4 over layers", "log10", -10, 2),
    Feature("layers", "number of layers", "log10", 0, 6),
)
FEATURES: tuple[Feature, ...] = LAYER_FEATURES + GLOBAL_FEATURES
FEATURE_DIM = len(FEATURES)
FEATURE_INDEX: dict[str, int] = {feature.name: i for i, feature in enumerate(FEATURES)}
SCHEMA_HASH = hashlib.sha256(json.dumps([(f.name, f.unit, f.low, f.high) for f in FEATURES]).encode()).hexdigest()[:16]
