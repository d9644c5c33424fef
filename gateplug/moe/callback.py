"""RegulateRouters: per-layer regularisers for the routers of any model, and the terms that gates have of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gateplug.core.edit import AddGate, Edit
from gateplug.core.errors import PlugError, listed
from gateplug.core.optim import GroupOptions
from gateplug.core.plug import Plug
from gateplug.core.select import Layers
from gateplug.core.table import print_table
from gateplug.moe.bias import Balanced, bias_of, move
from gateplug.moe.families import Adapter
from gateplug.moe.layers import DSelectK
from gateplug.moe.own_loss import say_own_loss, watch_calls
from gateplug.moe.padding import Padding
from gateplug.moe.possible import done, named, possible, reason
from gateplug.moe.regulate import Regulator
from gateplug.moe.routers import Router, find_routers, named_by, no_router
from gateplug.moe.routing import ExpertGate
from gateplug.moe.selection import warn_ahead, warn_asleep, warn_frozen, warn_unreached
from gateplug.moe.terms import Weights
from gateplug.moe.upcycle import Upcycle


class RegulateRouters(Plug):
    """Regularise the routers of a mixture of experts, each layer by itself, summed over the layers.

    For gateplug's gates, the routers of Hugging Face's mixtures (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V3, GPT-OSS, Switch …) and,
    by an adapter, any other. With p = softmax(logits) and means over the rows (tokens) that are no padding::

        load_balance = E Σ_e f_e P_e     f_e share of the choices, P_e mean of p_e: 1 at balance, E at collapse (k = 1)
        z_loss       = mean logsumexp(logits)²
        importance   = squared coefficient of variation of Σ_t q_te over the experts
        entropy      = mean H(p)
        smooth_load  = squared coefficient of variation of the smooth load of a noisy :class:`TopKGate`

    It also brings the terms that gates have of their own into the loss (:class:`DSelectK`: entropy and reachability), trains the
    parameters of DSelectK without weight decay, which would pull them away from a decision, and advances their ramps.

    Args:
        load_balance: factor of the term, ≥ 0.
        z_loss: the same.
        importance: the same.
        entropy: the same, of either sign: > 0 makes routers decide, < 0 keeps them open.
        smooth_load: ≥ 0.
        bias_rate: ≥ 0: after each optimizer step move the bias with which experts are chosen by this much towards balance,
            without a loss (arXiv 2408.15664); for :class:`SigmoidGate` and routers with an `e_score_correction_bias`.
        routers: which routers, see :func:`gateplug.core.select.select`; "auto" takes all.
        adapters: for routers of one's own: class (or its name) -> function from the router's output to (logits (…, E), chosen
            (…, k)), or these and the weights (…, k).
        scope: whether f, the number of rows and the sums of importance are those of a process (`local`) or of all (`global`). The
            gradient is exact for either. Under accumulation each batch counts by itself.

    Raises:
        ValueError: a factor out of its range, an unknown scope.
        PlugError: no router is found (lists what was looked at), a term that no router here can have, a bias_rate without a bias.
    """

    room: ClassVar[str] = "moe"
    summary: ClassVar[str] = "per-layer regularisers and bias control for the routers of any mixture of experts"
    paper: ClassVar[str] = "arXiv 2106.03760, 1701.06538, 2101.03961, 2202.08906, 2408.15664"
    injects: ClassVar[bool] = True
    chooser: ClassVar[str] = "routers"

    def __init__(
        self,
        load_balance: float = 0.0,
        z_loss: float = 0.0,
        importance: float = 0.0,
        entropy: float = 0.0,
        smooth_load: float = 0.0,
        bias_rate: float = 0.0,
        routers: Layers = "auto",
        adapters: dict[type[nn.Module] | str, Adapter] | None = None,
        scope: str = "local",
    ) -> None:
        factors = {"load_balance": load_balance, "z_loss": z_loss, "importance": importance, "smooth_load": smooth_load}
        for name, value in {**factors, "entropy": entropy, "bias_rate": bias_rate}.items():
            low = float("-inf") if name == "entropy" else 0
            if not isinstance(value, int | float) or not low <= value < float("inf") or value == float("-inf"):
                raise ValueError(f"{name}={value!r} must be a finite number" + ("" if name == "entropy" else " ≥ 0"))
        if scope not in ("local", "global"):
            raise ValueError(f"scope={scope!r} must be 'local' (statistics of each process) or 'global' (of all processes)")
        self.load_balance, self.z_loss, self.importance, self.entropy = load_balance, z_loss, importance, entropy
        self.smooth_load, self.bias_rate, self.scope = smooth_load, bias_rate, scope
        self.routers, self.layers, self.adapters = routers, routers, adapters
        self.group = GroupOptions(weight_decay=0.0)
        self._padding = Padding()
        self._steps, self._seen = 0, 0
        self._regulators: dict[str, Regulator] = {}
        self._biased: list[Balanced] = []
        self._exact: dict[str, Tensor] = {}  # biases of a checkpoint
        self._selectors: dict[str, DSelectK] = {}
        self._handles: list[RemovableHandle] = []

    # ------------------------------------------------------------------ what is attached

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        """All routers."""
        return {router.title: router.module for router in find_routers(module, self.adapters)[0].values()}

    def nothing(self, module: nn.Module) -> str:
        """Say what was looked at."""
        found, left = find_routers(module, self.adapters)
        if not found:
            return f"RegulateRouters {no_router(module, left)}"
        names = listed(r.title for r in found.values())
        todo = "give a factor, e.g. load_balance=0.01, z_loss=0.001 or bias_rate=0.001"
        return f"RegulateRouters with routers={self.routers!r} has nothing to do for {names}: {todo}"

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        """One regulator on each router."""
        found, _ = find_routers(module, self.adapters)
        chosen = named_by(layers, found, "RegulateRouters")
        asked = Weights(self.load_balance, self.z_loss, self.importance, self.entropy, self.smooth_load)
        allowed = {r.name: possible(r) for r in chosen}
        for term in asked.named():
            if not any(term in terms for terms in allowed.values()):
                raise PlugError(f"{term} has no meaning for any router here: {reason(term, chosen)}")
        if self.bias_rate and not any(bias_of(r.owner) is not None for r in chosen):
            raise PlugError(
                f"bias_rate={self.bias_rate} needs routers with a bias for the choice alone (gp.SigmoidGate, or a router with "
                f"e_score_correction_bias as DeepSeek-V3's); here are {named(chosen)}. Use load_balance"
            )
        return [edit for r in chosen for edit in self._edit(r, asked, allowed[r.name])]

    def _edit(self, router: Router, asked: Weights, allowed: set[str]) -> list[Edit]:
        weights = Weights(**{name: value for name, value in asked.named().items() if name in allowed})
        biased = bool(self.bias_rate) and bias_of(router.owner) is not None
        gate = router.gate if isinstance(router.gate, DSelectK) else None
        if not (weights.named() or biased or gate is not None):
            return []
        what = done(router, {**weights.named(), **({"bias": self.bias_rate} if biased else {})})
        reading = (router.read, router.k, router.title, router.experts, weights, self._padding, router.side, router.tasks)
        own = gate.terms if gate is not None and gate.has_terms else None
        regulator = Regulator(*reading, everywhere=self.scope == "global", counting=biased, own=own)
        return [AddGate(router.name, regulator, "regulator", what)]

    def describe(self, module: nn.Module) -> dict[str, str]:
        """Router -> what is done to it."""
        return {name.removesuffix(".tap"): what for name, what in super().describe(module).items()}

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters of the regulated DSelectK gates: not brought in by this plug, but trained by it in a group of their own."""
        ids = {id(p) for gate in self._selectors.values() for p in gate.parameters()} if self._found(module) else set()
        return {name: p for name, p in module.named_parameters() if id(p) in ids}

    def attach(self, module: nn.Module) -> None:
        """See :meth:`Plug.attach`. On a model that this plug is new to, ramps begin anew."""
        if self._found(module) is None:
            self._steps, self._exact = 0, {}
        super().attach(module)

    def _settle(self, module: nn.Module) -> None:
        super()._settle(module)
        self._regulators = {name.rsplit(".", 1)[0]: m for name, m in self.gates(module).items() if isinstance(m, Regulator)}
        self._biased, self._selectors = [], {}
        for title, regulator in ((name.removesuffix(".tap"), r) for name, r in self._regulators.items()):
            regulator.padding = self._padding
            owner = module.get_submodule(title)
            bias = bias_of(owner)
            if isinstance(owner, ExpertGate):
                owner.label = title
            if isinstance(owner, DSelectK):
                self._selectors[title] = owner
            if regulator.counting and bias is not None:
                self._biased.append(Balanced(title, regulator, bias, self._exact.get(title)))
        self._tell_steps()

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Routers that come later would not be regulated, without a word."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, Upcycle) for other in callbacks[callbacks.index(self) :]):
            raise PlugError("Upcycle brings routers: put Upcycle before RegulateRouters in the list of callbacks")

    # ------------------------------------------------------------------ in a training

    def step(self, module: nn.Module) -> None:
        """An optimizer step was taken: advance ramps, move biases. A Trainer does this; call it yourself in your own loop."""
        self._steps += 1
        self._tell_steps()
        move(self._biased, self.bias_rate)

    def _tell_steps(self) -> None:
        for gate in self._selectors.values():
            gate.steps.fill_(self._steps)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for what would go wrong."""
        super().on_fit_start(trainer, pl_module)
        say_own_loss(pl_module)
        self._handles = watch_calls(pl_module)
        warn_frozen(pl_module)
        warn_ahead(pl_module, [m for m in pl_module.modules() if isinstance(m, ExpertGate)])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps count from here."""
        super().on_train_start(trainer, pl_module)
        self._seen = trainer.global_step
        warn_asleep(self._regulators)
        self._tell_steps()
        for router in self._biased:
            router.exact = self._exact.get(router.name)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read which rows are padding."""
        self._padding.read(batch)
        for regulator in self._regulators.values():
            regulator.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Act after an optimizer step."""
        self._padding.clear()
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.step(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the routers' terms in the last batch, and say which gates have not come down to k experts."""
        warn_unreached(pl_module, {name.removesuffix(".tap"): r.used() for name, r in self._regulators.items()})
        if rows := self.table():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            lines = [(name, *(f"{row[c]:.4g}" if c in row else "" for c in columns)) for name, row in rows.items()]
            print_table("Routers in the last batch (terms without their factors)", ("router", *columns), lines)

    def table(self) -> dict[str, dict[str, float]]:
        """Of each router, its terms in the last batch, without their factors."""
        values = {name.removesuffix(".tap"): r.values for name, r in self._regulators.items() if r.values}
        return {name: {term: float(value()) for term, value in terms.items()} for name, terms in values.items()}

    def _release(self, module: nn.Module) -> None:
        super()._release(module)
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """The arguments; the number of optimizer steps, for ramps; biases that the model holds less exactly."""
        exact = {router.name: router.exact for router in self._biased if router.exact is not None}
        return {**super().state_dict(), "steps": self._steps, "biases": exact}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them."""
        self._steps, self._exact = state_dict.get("steps", 0), state_dict.get("biases", {})
