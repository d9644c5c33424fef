"""The other gates of the field: top-k with and without noise, sigmoid with a balancing bias, softmax, expert choice."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gateplug.core.errors import real_numbers
from gateplug.moe.functional import expert_capacity, expert_choice, noisy_chances
from gateplug.moe.routing import ExpertGate, Routing
from gateplug.moe.rows import scores

Normalize = Literal["selected", "all"]


class _LogitGate(ExpertGate):
    """A gate with one logit an expert: a bias-free linear layer of the input, or parameters where the choice is static."""

    def __init__(self, experts: int, k: int, dim: int | None, tasks: int | None) -> None:
        super().__init__(experts, k, dim, tasks)
        self.logits: nn.Parameter | nn.Linear
        if dim is None:
            self.logits = nn.Parameter(torch.empty(*(() if tasks is None else (tasks,)), experts))
        else:
            self.logits = nn.Linear(dim, (tasks or 1) * experts, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Small and normal: nearly uniform, and no ties."""
        for p in [self.logits] if isinstance(self.logits, nn.Parameter) else self.logits.parameters():
            p.normal_(std=0.02)

    def scores(self, rows: Tensor) -> Tensor:
        """Logits (R, experts) for rows (R, dim); times `tasks`."""
        return scores(self.logits, rows).reshape(-1, self.experts)

    def _routing(self, slots: Tensor, assigned: Tensor, logits: Tensor, load: Tensor | None = None) -> Routing:
        weights = torch.zeros_like(logits).scatter(-1, assigned, slots)
        return Routing(weights, assigned, logits, slots, load=load)


class TopKGate(_LogitGate):
    """The k experts with the largest logits x Wᵀ; noisy in training if asked (arXiv 1701.06538).

    Parameters: `logits.weight` (experts, dim), static `logits` (experts,); noisy `noise.weight` (experts, dim).

    Args:
        experts: E, ≥ 2.
        k: 1 … E.
        dim: width of the input; None for a static choice.
        normalize: `selected`: softmax over the k chosen logits (Mixtral); `all`: softmax over all, the k largest kept as they are
            (Switch, Qwen, OLMoE).
        noisy: in training add ε · softplus(x W_nᵀ), ε ~ N(0, 1), to the logits. Needs `dim` and k < E.
        tasks: number of gates side by side.

    Raises:
        ValueError: a number out of its range, an unknown `normalize`, or noise where there is no input.
    """

    limits = True

    def __init__(
        self,
        experts: int,
        k: int,
        dim: int | None = None,
        normalize: Normalize = "selected",
        noisy: bool = False,
        tasks: int | None = None,
    ) -> None:
        super().__init__(experts, k, dim, tasks)
        if normalize not in ("selected", "all"):
            raise ValueError(f"normalize={normalize!r} must be 'selected' (weights sum to 1) or 'all' (softmax over all experts)")
        if noisy and (dim is None or k >= experts or tasks is not None):
            given = f"dim={dim}, k={k}, experts={experts}, tasks={tasks}"
            raise ValueError(f"noisy=True needs an input width, k < experts and no tasks; got {given}")
        self.normalize: Normalize = normalize
        self.noise = nn.Linear(dim, experts, bias=False) if noisy and dim is not None else None
        if self.noise is not None:
            nn.init.normal_(self.noise.weight, std=0.02)

    def decide(self, rows: Tensor) -> Routing:
        """See :class:`ExpertGate`."""
        clean = self.scores(rows)
        if self.noise is None or not self.training:
            slots, assigned = self._chosen(clean)
            return self._routing(slots, assigned, clean)
        scale = nn.functional.softplus(scores(self.noise, rows))
        noisy = clean + torch.randn_like(clean) * scale
        slots, assigned = self._chosen(noisy)
        return self._routing(slots, assigned, noisy, noisy_chances(clean, noisy.detach(), scale, self.k))

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalize == "all":
            slots, assigned = logits.softmax(-1).topk(self.k, -1)
            return slots, assigned
        top, assigned = logits.topk(self.k, -1)
        return top.softmax(-1), assigned

    def extra_repr(self) -> str:
        """The numbers, and the normalisation."""
        return f"{super().extra_repr()}, normalize={self.normalize!r}" + (", noisy=True" if self.noise is not None else "")


class SigmoidGate(_LogitGate):
    """Sigmoid scores with a bias that balances (DeepSeek-V3, arXiv 2412.19437): chosen by s + b, weighted by s alone.

    Args:
        experts: E, ≥ 2.
        k: 1 … E.
        dim: width of the input; None for a static choice.
        normalize: divide the k weights by their sum.
        scale: factor on the weights, > 0.

    The buffer `bias` (experts,) is moved by `RegulateRouters(bias_rate=…)`, never by a gradient.

    Raises:
        ValueError: a number out of its range.
    """

    limits = True

    def __init__(self, experts: int, k: int, dim: int | None = None, normalize: bool = True, scale: float = 1.0) -> None:
        super().__init__(experts, k, dim, None)
        real_numbers(scale=scale)
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale} must be a finite number > 0")
        self.normalize, self.scale = normalize, scale
        self.register_buffer("bias", torch.zeros(experts))
        self.bias: Tensor

    def decide(self, rows: Tensor) -> Routing:
        """See :class:`ExpertGate`."""
        logits = self.scores(rows)
        s = logits.sigmoid()
        assigned = (s.detach() + self.bias).topk(self.k, -1).indices
        slots = s.gather(-1, assigned)
        if self.normalize:
            slots = slots / slots.sum(-1, keepdim=True).clamp_min(1e-20)
        return self._routing(slots * self.scale, assigned, logits)


class SoftmaxGate(_LogitGate):
    """All experts, weighted by the softmax of x Wᵀ: dense, every expert runs on every row.

    Args:
        experts: E, ≥ 2.
        dim: width of the input; None for a static choice.
        tasks: number of gates side by side.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, experts: int, dim: int | None = None, tasks: int | None = None) -> None:
        super().__init__(experts, experts, dim, tasks)

    def decide(self, rows: Tensor) -> Routing:
        """See :class:`ExpertGate`."""
        logits = self.scores(rows)
        probs = logits.softmax(-1)
        assigned = torch.arange(self.experts, device=logits.device).expand(len(logits), -1)
        return Routing(probs, assigned, logits)


class ExpertChoiceGate(_LogitGate):
    """Each expert takes its best rows (arXiv 2202.09368): equal loads, any number of experts for a row.

    It sees the whole batch: in a causal language model that is a look into the future, and samples depend on one another.

    Args:
        experts: E, ≥ 2.
        dim: width of the input.
        capacity_factor: experts that a row has on average, > 0; an expert takes ⌈factor · rows / E⌉.

    Raises:
        ValueError: a number out of its range.
    """

    couples_samples = True

    def __init__(self, experts: int, dim: int, capacity_factor: float = 2.0) -> None:
        super().__init__(experts, experts, dim, None)
        real_numbers(capacity_factor=capacity_factor)
        if not 0 < capacity_factor < float("inf"):
            raise ValueError(f"capacity_factor={capacity_factor} must be a finite number > 0")
        self.capacity_factor = capacity_factor

    def decide(self, rows: Tensor) -> Routing:
        """See :class:`ExpertGate`."""
        logits = self.scores(rows)
        if not len(rows):
            return Routing(logits.softmax(-1), None, logits)
        taken, weights = expert_choice(logits, expert_capacity(len(rows), self.experts, 1, self.capacity_factor))
        q = torch.zeros_like(logits.T).scatter(-1, taken, weights).T
        return Routing(q, None, logits)
