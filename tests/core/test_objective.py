"""Terms and injections against the plain sum of losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gateplug as gp
from gateplug.core.objective import Injection, batch_size
from tests.modules import UserModule, digits, loader, trainer
from tests.plugs import ToyPlug


class Literal(UserModule):
    """The toy plug's gates and losses written into the module by hand."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(lr=0.05)
        self.logits = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(2)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        energy = 0.0
        h = self.net.embed(x)
        for block, logit in zip(self.net.blocks, self.logits, strict=True):
            gated = block.fc2(block.act(block.fc1(block.norm(h)))) * torch.sigmoid(logit)
            energy = energy + 0.3 * gated.float().square().mean()
            h = h + gated
        loss = F.cross_entropy(self.net.head(h.mean(1)), y)
        return loss + energy + 0.1 * sum(torch.sigmoid(v).mean() for v in self.logits)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net.parameters()}, {"params": self.logits, "lr": 0.025, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01)


class Decayed(UserModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("checkpointing", [None, "nonreentrant", "reentrant"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_training_equals_the_losses_written_out(
    checkpointing: str | None, accumulate: int, scale: float | None, tmp_path: Path
) -> None:
    def fit(module: UserModule, callbacks: list[Any]) -> UserModule:
        settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "callbacks": callbacks}
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
            settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
        trainer(tmp_path, **settings).fit(module, loader())
        return module

    L.seed_everything(1, verbose=False)
    plugged = fit(Decayed(checkpointing=checkpointing), [ToyPlug()])
    L.seed_everything(1, verbose=False)
    literal = fit(Literal(), [])
    # float16 keeps 11 bits; in float32 only the order of the sums differs
    atol = 2e-3 if scale else 2e-6
    for name, value in literal.net.state_dict().items():
        block = name.replace("fc2.", "fc2.")
        assert torch.allclose(plugged.net.state_dict()[block], value, rtol=0, atol=atol), name
    for block, logit in zip(plugged.net.blocks, literal.logits, strict=True):
        assert torch.allclose(block.fc2.gate.logit, logit, rtol=0, atol=atol)
        assert not torch.equal(logit, torch.ones(16))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_injection_gives_the_gradient_of_the_term(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 4).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def term(v: Tensor) -> Tensor:
        return (v.square() - v).mean() * 0.7

    h = linear(x)
    (h.sin().sum() + term(h)).backward()
    expected = [x.grad.clone(), linear.weight.grad.clone()]
    x.grad = linear.weight.grad = None
    injection = Injection()

    def forward(x: Tensor) -> Tensor:
        return injection.add(linear(x), "toy/term", term).sin()

    h = forward(x) if reentrant is None else checkpoint(forward, x, use_reentrant=reentrant)
    loss = h.sum()
    injection.watch(loss)
    (loss * 1.0).backward()
    assert torch.allclose(x.grad, expected[0], rtol=1e-12)
    assert torch.allclose(linear.weight.grad, expected[1], rtol=1e-12)
    assert torch.allclose(injection.values()["toy/term"], term(linear(x)).detach())


def test_injection_is_scaled_as_the_loss_is() -> None:
    grads = []
    for factor in (1.0, 0.25, 1024.0):
        x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        injection = Injection()
        loss = injection.add(x, "t", lambda v: v.pow(3).sum()).sum()
        injection.watch(loss)
        (loss * factor).backward()
        grads.append(x.grad / factor)
    assert torch.equal(grads[0], 1 + 3 * torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_recomputed_layers_are_counted_once() -> None:
    calls: list[int] = []
    injection = Injection()

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return injection.add(x, "t", lambda v: v.sum())

    x = torch.ones(2, requires_grad=True)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert len(calls) == 2
    assert float(injection.values()["t"]) == 2.0


def test_terms_are_logged_unscaled_and_added_to_tensor_dict_and_none(tmp_path: Path) -> None:
    class Returns(UserModule):
        form: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)["loss"]
            return {"dict": {"loss": loss, "kept": 1}, "tensor": loss, "none": None}[self.form]

    class See(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            self.outputs = outputs

    for form in ("dict", "tensor", "none"):
        module, see = Returns(), See()
        module.form = form
        t = trainer(tmp_path, callbacks=[ToyPlug(sparsity=2.0, energy=0.0), see], max_steps=1, accumulate_grad_batches=4)
        t.fit(module, loader())
        if form == "none":
            continue
        assert see.outputs.get("kept") == (1 if form == "dict" else None)
        assert torch.allclose(t.callback_metrics["toy/sparsity"], torch.tensor(4 * torch.sigmoid(torch.tensor(1.0))), atol=0.01)


def test_manual_optimization_is_refused_with_the_way_out(tmp_path: Path) -> None:
    class Manual(UserModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    module = Manual()
    with pytest.raises(gp.PlugError, match=r"plug\.total_loss"):
        trainer(tmp_path, callbacks=[ToyPlug()]).fit(module, loader())
    assert list(module.state_dict()) == list(UserModule().state_dict())


def test_a_loop_of_ones_own_gets_the_gradient_of_the_sum_from_the_first_step_on() -> None:
    torch.manual_seed(0)
    x, y = digits(8)[:]
    net = UserModule().net
    one = ToyPlug(layers="blocks.0.fc2", sparsity=0.2)
    two = ToyPlug(layers="blocks.1.fc2", energy=0.7)
    for plug in (one, two):
        plug.attach(net)
    outs: list[Tensor] = []
    for block in net.blocks:
        block.fc2.gate.register_forward_hook(lambda m, a, out: outs.append(out))
    for factor in (1.0, 8.0):  # a loss scale of one's own
        net.zero_grad()
        loss = two.total_loss(net, one.total_loss(net, F.cross_entropy(net(x), y)))
        (factor * loss).backward()
        grads = {n: p.grad / factor for n, p in net.named_parameters()}
        for plug in (one, two):
            for gate in plug.gates(net).values():
                gate.injection = None
        net.zero_grad()
        outs.clear()
        literal = F.cross_entropy(net(x), y) + 0.3 * outs[0].square().mean() + 0.7 * outs[1].square().mean()
        literal = literal + sum(w * torch.sigmoid(net.blocks[i].fc2.gate.logit).mean() for i, w in enumerate((0.2, 0.1)))
        literal.backward()
        assert all(torch.allclose(grads[n], p.grad, atol=1e-7) for n, p in net.named_parameters())
        for plug in (one, two):
            plug.attach(net)
    assert "training_step" not in net.__dict__


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(3, 2), 3),
        ((torch.ones(()), ["a", "b"], torch.ones(8)), 8),
        ((torch.ones(4), 1), 4),
        ({"a": "text", "b": [torch.ones(5)]}, 5),
        (None, 1),
        (torch.ones(()), 1),
    ],
)
def test_batch_size_is_the_length_of_the_first_tensor(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_tether_gives_the_gradient_of_a_term_of_something_that_goes_no_further(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    router, injection = nn.Linear(5, 3, dtype=torch.float64), Injection()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        logits = router(x)  # reported only: the output does not depend on it but through the weights
        weights, unused = logits.softmax(-1), logits * 2
        weights, _ = injection.tether((weights, unused), logits, "toy/z", lambda h: 0.3 * h.logsumexp(-1).square().mean())
        return weights[:, :1] * x

    out = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
    loss = out.square().sum()
    injection.watch(loss)
    (4 * loss).backward()
    assert float(injection.values()["toy/z"]) == pytest.approx(float(0.3 * router(x).logsumexp(-1).square().mean().detach()))

    got = [p.grad.clone() for p in (x, *router.parameters())]
    for p in (x, *router.parameters()):
        p.grad = None
    logits = router(x)
    loss = (logits.softmax(-1)[:, :1] * x).square().sum() + 0.3 * logits.logsumexp(-1).square().mean()
    (4 * loss).backward()
    for p, gradient in zip((x, *router.parameters()), got, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-12)


def test_several_carriers_bring_the_gradient_once_and_none_brings_nothing() -> None:
    injection = Injection()
    x = torch.ones(3, requires_grad=True)
    a, b = injection.send((x * 1, x * 2), x, torch.full((3,), 5.0), {"toy/x": lambda: torch.tensor(1.0)})
    (a.sum() + b.sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [8.0] * 3
    assert injection.send((), x, torch.ones(3), {}) == ()
