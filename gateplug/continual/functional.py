"""The formulas of continual learning, pure and in the precision of what they are given.

GateON: Barry, Gerstner, Bellec 2023, arXiv 2306.01690. Elastic weight consolidation: Kirkpatrick et al. 2017, arXiv 1612.00796.
Synaptic intelligence: Zenke, Poole, Ganguli 2017, arXiv 1703.04200. Memory aware synapses: Aljundi et al. 2018, arXiv
1711.09601. Dark experience replay: Buzzega et al. 2020, arXiv 2004.07211. Figures of a stream: Lopez-Paz and Ranzato 2017, arXiv
1706.08840; Chaudhry et al. 2018, arXiv 1801.10112.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gateplug.continual.detection import detector_step, detector_trace, deviates
from gateplug.continual.matrix import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
)
from gateplug.core.permuted import permutation

__all__ = [
    "availability_step",
    "average_accuracy",
    "backward_transfer",
    "blend_update",
    "der_loss",
    "detector_step",
    "detector_trace",
    "deviates",
    "fisher",
    "forgetting",
    "forward_transfer",
    "gate",
    "intransigence",
    "learning_accuracy",
    "mas_importance",
    "neuron_relevance",
    "normalized_gate",
    "obstruct",
    "parameter_relevance",
    "permutation",
    "quadratic_penalty",
    "reservoir_slot",
    "si_importance",
    "si_path",
]


def gate(g: Tensor) -> Tensor:
    """tanh(relu(g))², in [0, 1), elementwise (arXiv 2306.01690)."""
    return torch.tanh(torch.relu(g)).square()


def normalized_gate(g: Tensor) -> Tensor:
    """Gates of a layer over their root mean square, so that a layer whose units are half closed keeps its scale.

    Args:
        g: (n,), of the active context.

    Returns:
        (n,): gate / max(rms, 1e-8), the rms without gradient.
    """
    opened = gate(g)
    return opened / opened.detach().square().mean().sqrt().clamp_min(1e-8)


def neuron_relevance(h: Tensor, grad: Tensor) -> Tensor:
    """Relevance of each unit: mean of (h · ∂ℓ/∂h)² over samples, tokens and positions.

    Args:
        h: (B, …, n), activations.
        grad: the same shape, gradient of the sum of the samples' losses.

    Returns:
        (n,).
    """
    return (h * grad).square().flatten(0, -2).mean(0)


def parameter_relevance(w: Tensor, grad: Tensor) -> Tensor:
    """Relevance of each weight: (w · ∂L/∂w)², elementwise."""
    return (w * grad).square()


def availability_step(a: Tensor, relevance: Tensor, eta: float, reactivation: float = 0.0) -> Tensor:
    """One step of availability: what is relevant becomes less available for other contexts.

    Args:
        a: any shape, in [0, 1].
        relevance: like `a`, ≥ 0.
        eta: rate, > 0.
        reactivation: relevance, in units of the mean, below which availability grows again.

    Returns:
        clip(a − η · a · (R / mean R − ε), 0, 1); `a` where the mean relevance is 0 or not finite.

    Raises:
        ValueError: `eta` ≤ 0, or shapes that differ.
    """
    if not eta > 0:
        raise ValueError(f"eta={eta} must be > 0")
    if a.shape != relevance.shape:
        raise ValueError(f"availability {tuple(a.shape)} and relevance {tuple(relevance.shape)} must have one shape")
    mean = relevance.mean()
    usable = mean.isfinite() & (mean > 0)
    share = relevance / torch.where(usable, mean, torch.ones_like(mean))
    stepped = (a - eta * a * (share - reactivation)).clamp(0, 1)
    return torch.where(usable, stepped, a)


def _like(tensor: Tensor, a: Tensor) -> Tensor:
    """Availability in a shape that multiplies `tensor`: elementwise, or of rows."""
    if a.shape == tensor.shape:
        return a
    if a.dim() == 1 and tensor.dim() > 1 and len(a) == len(tensor):
        return a.reshape(-1, *[1] * (tensor.dim() - 1))
    raise ValueError(
        f"availability of shape {tuple(a.shape)} fits neither the rows nor the elements of a tensor {tuple(tensor.shape)}"
    )


def obstruct(tensor: Tensor, a: Tensor) -> Tensor:
    """A gradient (or update) times availability.

    Args:
        tensor: (n, …).
        a: (n,), of the rows, or of the shape of `tensor`.

    Raises:
        ValueError: shapes that fit neither rows nor elements.
    """
    return tensor * _like(tensor, a)


def blend_update(old: Tensor, new: Tensor, a: Tensor) -> Tensor:
    """Let through a part of an update: old + a · (new − old), exactly `old` where a = 0 and exactly `new` where a = 1.

    Args:
        old: (n, …), before the update.
        new: after it.
        a: (n,), of the rows, or of their shape.

    Raises:
        ValueError: shapes that fit neither rows nor elements.
    """
    a = _like(old, a)
    return torch.where(a == 0, old, torch.lerp(old, new, a))  # lerp alone makes 0 · inf of an update that overflowed


def fisher(per_sample_grads: Tensor) -> Tensor:
    """Diagonal of the Fisher information: mean of squares over samples (N, …) of the gradient of ln p(y | x)."""
    return per_sample_grads.square().mean(0)


def mas_importance(per_sample_grads: Tensor) -> Tensor:
    """Mean of absolute values over samples (N, …) of the gradient of ‖f(x)‖²."""
    return per_sample_grads.abs().mean(0)


def quadratic_penalty(theta: Tensor, anchor: Tensor, importance: Tensor) -> Tensor:
    """½ Σ importance · (θ − anchor)², a scalar."""
    return 0.5 * (importance * (theta - anchor).square()).sum()


def si_path(omega: Tensor, grad: Tensor, delta: Tensor) -> Tensor:
    """Path integral after a step: ω − g · Δθ, g the gradient of the loss without the penalty."""
    return omega - grad * delta


def si_importance(big_omega: Tensor, omega: Tensor, theta: Tensor, start: Tensor, xi: float = 0.1) -> Tensor:
    """Importance after a task: Ω + max(ω, 0) / ((θ − θ_start)² + ξ).

    Raises:
        ValueError: `xi` ≤ 0.
    """
    if not xi > 0:
        raise ValueError(f"xi={xi} must be > 0")
    return big_omega + omega.clamp_min(0) / ((theta - start).square() + xi)


def reservoir_slot(n: int, capacity: int, draw: int) -> int:
    """Slot of a buffer into which item number n goes (Vitter 1985, algorithm R).

    Args:
        n: number of the item, from 1.
        capacity: slots, ≥ 1.
        draw: uniform in {0 … n − 1}; not looked at while the buffer fills.

    Returns:
        The slot, or −1 where the item is not kept.

    Raises:
        ValueError: `capacity` < 1 or n < 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be ≥ 1")
    if n < 1:
        raise ValueError(f"n={n} must be ≥ 1: items are counted from 1")
    if n <= capacity:
        return n - 1
    return draw if draw < capacity else -1


def der_loss(logits: Tensor, stored: Tensor, logits_b: Tensor, labels_b: Tensor, alpha: float, beta: float) -> Tensor:
    """DER++: α · mean ‖z − z_stored‖² + β · cross-entropy, on two draws from a buffer (arXiv 2004.07211, eq. 6).

    Args:
        logits: (B, C), now, of the first draw.
        stored: (B, C), of the same samples when they entered.
        logits_b: (B2, C), now, of the second draw.
        labels_b: (B2,).
        alpha: ≥ 0; the mean is over samples and classes.
        beta: ≥ 0.
    """
    return alpha * F.mse_loss(logits, stored) + beta * F.cross_entropy(logits_b, labels_b)
