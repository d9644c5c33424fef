"""Per-sample gradients: of every network the same as those of samples that are run one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import gateplug as gp
from gateplug.continual import per_sample
from gateplug.continual.own_steps import answer, undisturbed
from gateplug.continual.per_sample import PerSample
from gateplug.core.answers import Answer
from tests.modules import UserModule, digits, vit

N = 6


def loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits[None], label[None])


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def texts() -> tuple[dict[str, Tensor], Tensor]:
    """Texts of different lengths, padded."""
    torch.manual_seed(1)
    lengths = torch.tensor([8, 3, 5, 8, 2, 7])
    mask = (torch.arange(8) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 50, (N, 8)) * mask, "attention_mask": mask}, torch.tensor([0, 1, 2, 0, 1, 2])


class Normed(nn.Sequential):
    """BatchNorm whose statistics are not those of a fresh layer."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 10))
        self.train()(torch.rand(32, 64))


class Tied(nn.Module):
    """One weight in two places, and one that has no part in the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.read, self.idle = nn.Linear(64, 10), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))


def case(kind: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor]:
    """A network, its call and labels."""
    torch.manual_seed(0)
    if kind == "bert":
        inputs, y = texts()
        return bert(), (), inputs, y
    x, y = digits(N, image=kind == "vit")[:]
    nets = {"mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)), "norm": Normed}
    net = {**nets, "tied": Tied, "vit": vit, "user": lambda: UserModule().net}[kind]()
    return net, (x,), {}, y


def one_by_one(net: nn.Module, args: Any, kwargs: Any, y: Tensor) -> dict[str, Tensor]:
    """Plain backward passes of batches of one sample."""
    found: dict[str, list[Tensor]] = {n: [] for n, _ in net.named_parameters()}
    for i in range(N):
        net.zero_grad()
        out = net(*[a[i : i + 1] for a in args], **{k: v[i : i + 1] for k, v in kwargs.items()})
        F.cross_entropy(out if isinstance(out, Tensor) else out.logits, y[i : i + 1]).backward()
        for n, p in net.named_parameters():
            found[n].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    net.zero_grad()
    return {n: torch.stack(g) for n, g in found.items()}


@pytest.mark.parametrize("together", [True, False], ids=["vmap", "loop"])
@pytest.mark.parametrize("kind", ["mlp", "norm", "tied", "user", "vit", "bert"])
def test_gradients_are_those_of_single_samples(kind: str, together: bool) -> None:
    net, args, kwargs, y = case(kind)
    net.eval()
    expected = one_by_one(net, args, kwargs, y)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    gradients = PerSample(net, dict(net.named_parameters()), loss)
    gradients.together = together
    with torch.no_grad():
        asked = Answer(net, args, kwargs, torch.zeros(N, 10))
        found = list(gradients(asked, y, torch.arange(N)))
    if kind not in ("bert", "vit"):  # what vmap can run of Hugging Face's models is theirs to say
        assert gradients.together == together
    for name, g in expected.items():
        assert torch.allclose(torch.cat([piece[name] for piece in found]), g, atol=1e-6), name
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()), "measuring changes nothing"
    assert all(p.grad is None for p in net.parameters())


def test_a_network_that_looks_at_its_data_is_run_sample_by_sample() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.a(x) if x.sum() > 19.5 else self.b(x)

    torch.manual_seed(0)
    net = Looks()
    (x, y) = digits(N)[:]
    sums = x.flatten(1).sum(1)
    assert (sums > 19.5).any()
    assert (sums < 19.5).any()
    gradients = PerSample(net, dict(net.named_parameters()), loss)
    found = list(gradients(Answer(net, (x,), {}, torch.zeros(N, 10)), y, torch.arange(N)))
    assert not gradients.together
    assert len(found) == N
    for name, g in one_by_one(net, (x,), {}, y).items():
        assert torch.allclose(torch.cat([piece[name] for piece in found]), g, atol=1e-6), name


def test_no_more_numbers_than_allowed_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net, args, kwargs, y = case("mlp")
    numbers = sum(p.numel() for p in net.parameters())
    monkeypatch.setattr(per_sample, "AT_ONCE", 2 * numbers)
    pieces = list(
        PerSample(net, dict(net.named_parameters()), loss)(Answer(net, args, kwargs, torch.zeros(N, 10)), y, torch.arange(N))
    )
    assert [len(g["1.weight"]) for g in pieces] == [2, 2, 2]


def test_only_the_rows_that_are_asked_for_are_differentiated() -> None:
    net, args, kwargs, y = case("mlp")
    rows = torch.tensor([4, 1])
    (found,) = PerSample(net, dict(net.named_parameters()), loss)(Answer(net, args, kwargs, torch.zeros(N, 10)), y, rows)
    expected = one_by_one(net, args, kwargs, y)
    assert all(torch.allclose(found[n], g[rows], atol=1e-6) for n, g in expected.items())


def test_names_are_those_of_the_module_that_holds_the_network() -> None:
    module = UserModule()
    x, y = digits(N)[:]
    asked = answer(module, (x, y))
    assert asked.net is module.net
    (found,) = PerSample(asked.net, dict(module.named_parameters()), loss)(asked, y, torch.arange(N))
    assert set(found) == {n for n, _ in module.named_parameters()}


def test_asking_leaves_modes_random_numbers_gates_and_logs_alone() -> None:
    class Draws(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.rand(3)
            return super().training_step(batch, batch_idx)

    module = Draws(dropout=0.2)
    plug = gp.ReplaceFFN("swiglu")
    plug.attach(module)
    module.net.blocks[0].eval()
    modes, stream = [m.training for m in module.modules()], torch.get_rng_state()
    for gate in plug.gates(module).values():
        gate.recording = True
    with undisturbed(module):
        first, second = (answer(module, digits(N)[:]).logits for _ in range(2))
    assert torch.equal(first, second), "no dropout"
    assert not first.requires_grad
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(gate.recording and gate.openness() is None for gate in plug.gates(module).values())
    assert "log" not in module.__dict__
