"""Building models whose weights depend on a generator and on nothing else."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Model = TypeVar("Model", bound=nn.Module)


def build(
    factory: Callable[[], Model],
    generator: torch.Generator,
    std: float | None = None,
    embedding_std: float = 0.02,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """`factory()` with its parameters, of `dtype`, drawn from `generator`; the global random state is left as it was."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):                                    # torch.nn draws from the global state
        torch.set_default_dtype(dtype)                                         # never a float32 copy of a large bfloat16 model
        try:
            model = factory()
        finally:
            torch.set_default_dtype(before)
    return initialise(model, generator, std, embedding_std)


@torch.no_grad()
def initialise(model: Model, generator: torch.Generator, std: float | None = None, embedding_std: float = 0.02) -> Model:
    """Draw every parameter of `model` anew, in module order, from `generator` alone.

    Weights of linear and convolutional layers are Kaiming normal for ReLU (He et al. 2015, sec. 2.2), or of the
    given standard deviation `std` (0.02 in GPT-2); biases are zero, norms one and zero, embeddings normal (`embedding_std`),
    recurrent layers uniform in +-1/sqrt(hidden). Running statistics are reset. Raises `ValueError` for a module with
    parameters of its own that is none of these: its weights would otherwise come from the global random state.
    """
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(module, nn.Linear | _ConvNd):
            if std is None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            else:
                nn.init.normal_(module.weight, std=std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=embedding_std, generator=generator)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _NormBase):
            module.reset_parameters()                                          # ones and zeros: draws nothing
        elif isinstance(module, nn.RNNBase):
            bound = 1 / math.sqrt(module.hidden_size)
            for parameter in own.values():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        else:
            raise ValueError(
                f"no initialisation is known for {type(module).__name__} {name!r} (parameters {', '.join(own)}); "
                "draw them from the generator in its place"
            )
    return model
