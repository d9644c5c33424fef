"""Activations by name, and the name of an activation that somebody else wrote.

Libraries spell one function in many ways (`nn.GELU()`, `F.gelu`, `GELUActivation`, a lambda). What a plug may do with a
layer depends on the function alone, so it is recognised by its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

Activation: TypeAlias = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """X σ(1.702 x), the form that CLIP uses."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415); `gelu_new` in Hugging Face."""
    return F.gelu(x, approximate="tanh")


def linear(x: Tensor) -> Tensor:
    """The identity."""
    return x


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": torch.sigmoid,
    "linear": linear,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "quick_gelu": quick_gelu,
    "tanh": torch.tanh,
}

ATTRIBUTES = ("activation", "act", "act_fn", "activation_fn", "intermediate_act_fn", "activation_function")
"""Attribute names under which Hugging Face and torch hold the activation of a block, as a module or as a function."""


def activation_name(activation: object) -> str | None:
    """Name the function that `activation` computes, or None if it is none of `ACTIVATIONS`.

    It is called on 65 numbers in [-4, 4.5] in float64 and compared to 1e-6, so the exact and the tanh form of GELU (apart by
    5e-4) are told apart; their mean is not zero, so what centres its input does not pass. Anything that fails on a vector of
    numbers, or answers with something else, has no name.
    """
    if not callable(activation):
        return None
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return None
    x = torch.linspace(-4.0, 4.5, 65, dtype=torch.float64)
    try:
        # whatever is tried here (a dropout in training mode …), the caller's random stream stays where it is
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            y = activation(x.clone())
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(y, known(x), rtol=0, atol=1e-6)), None)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation: a known function, or one of torch's or Hugging Face's activation classes."""
    origin = type(module).__module__
    # a metric would count the numbers that a call tries; what holds buffers is no function of its input alone
    if isinstance(module, Metric) or any(True for _ in module.buffers()):
        return False
    if origin == "torch.nn.modules.activation":
        return not isinstance(module, nn.MultiheadAttention)
    if origin == "transformers.activations":
        return True
    # a dropout in eval mode computes the identity: that name alone makes no activation
    return not list(module.children()) and activation_name(module) not in (None, "linear")
