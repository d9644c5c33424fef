"""ExitRunner: what it gives is what running everything and picking each sample's exit would give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.batches import logits_of
from gateplug.early_exit import functional as E
from gateplug.early_exit.branch import ExitBranch, last_places
from gateplug.early_exit.costs import exit_costs
from gateplug.early_exit.flow import Flow
from gateplug.early_exit.stages import stages_of
from tests.early_exit.nets import NETS, Batch, Stacked, run

RULES = [("jei", "official"), ("jei", "cdf"), ("jei", "hazard"), ("confidence", ""), ("entropy", ""), ("patience", "")]


def with_exits(name: str, seed: int = 0) -> nn.Module:
    """A network of the table with exits whose gates differ from sample to sample."""
    torch.manual_seed(seed)
    net = NETS[name][0]()
    gp.EarlyExit().attach(net)
    for m in net.modules():
        if isinstance(m, ExitBranch):
            nn.init.normal_(m.gate.linear.weight, std=4.0)
            nn.init.normal_(m.head.weight, std=1.0)
    return net.eval()


def branches(net: nn.Module) -> list[ExitBranch]:
    return [m for m in net.modules() if isinstance(m, ExitBranch)]


@torch.no_grad()
def everything(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of all exits (B, L, C), and gates (B, K)."""
    for branch in branches(net):
        branch.listening = True
        if branch.reading.reads == "last":
            branch.reading.places = last_places((), batch, 0)
    last = logits_of(run(net, batch))
    heads = [branch.logits for branch in branches(net)]
    gates = torch.stack([b.gate(z).sigmoid() for b, z in zip(branches(net), heads, strict=True)], 1)
    for branch in branches(net):
        branch.listening = False
        branch.forget()
    return torch.stack([*heads, last], 1), gates


def scores(rule: str, mode: str, logits: Tensor, gates: Tensor) -> Tensor:
    if rule == "jei":
        return E.exit_scores(gates, mode)
    return {"confidence": E.confidence_scores, "entropy": E.entropy_scores, "patience": E.patience_scores}[rule](logits[:, :-1])


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 7), rule=st.sampled_from(RULES), place=st.floats(0, 1), seed=st.integers(0, 3))
def test_it_equals_running_everything(name: str, rows: int, rule: tuple[str, str], place: float, seed: int) -> None:
    net = with_exits(name, seed)
    batch = NETS[name][1](rows)
    logits, gates = everything(net, batch)
    s = scores(*rule, logits, gates)
    levels = s.flatten().unique()
    between = torch.cat([levels[:1] - 1, (levels[1:] + levels[:-1]) / 2, levels[-1:] + 1])  # where rounding does not matter
    gaps = torch.cat([levels.new_ones(1), levels[1:] - levels[:-1], levels.new_ones(1)])
    between = between[gaps > 1e-5]
    threshold = float(between[int(place * (len(between) - 1))])
    want = E.first_exit(s, threshold)
    out = run(gp.ExitRunner(net, rule[0], threshold, rule[1] or "official"), batch)
    assert torch.equal(out.exit, want)
    assert torch.allclose(out.logits, logits[torch.arange(rows), want], atol=1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rows", [1, 5])
def test_thresholds_at_the_ends_send_all_away_at_once_or_nobody(name: str, rows: int) -> None:
    net = with_exits(name)
    batch = NETS[name][1](rows)
    logits, _ = everything(net, batch)
    early = gp.ExitRunner(net, threshold=0.0)
    run(early, batch)  # the first time, a network of somebody's own is run as a whole, to see that it is a chain
    calls = []
    second = net.get_submodule(NETS[name][2][1])
    handle = second.register_forward_hook(lambda *_: calls.append(1))
    out = run(early, batch)
    assert not calls, "nothing after the first exit is run"
    assert out.exit.tolist() == [0] * rows
    assert torch.allclose(out.logits, logits[:, 0], atol=1e-5)
    out = run(gp.ExitRunner(net, threshold=1.5), batch)
    handle.remove()
    assert out.exit.tolist() == [logits.shape[1] - 1] * rows
    assert torch.allclose(out.logits, logits[:, -1], atol=1e-5)


def test_the_last_token_is_the_rightmost_that_is_no_padding() -> None:
    net = NETS["gpt2"][0]().eval()
    ids = torch.tensor([[5, 0, 7, 0], [0, 0, 3, 4], [6, 0, 0, 0]])
    assert last_places((ids,), {}, 0).tolist() == [2, 3, 0]
    assert last_places((), {"input_ids": ids}, None).tolist() == [3, 3, 3]
    hidden = net.transformer(input_ids=ids, use_cache=False).last_hidden_state
    rows = hidden[torch.arange(3), last_places((ids,), {}, 0)]
    assert torch.allclose(net.score(rows), net(input_ids=ids, use_cache=False).logits, atol=1e-6), "as the model itself reads"
    with pytest.raises(ValueError, match="needs input_ids"):
        last_places((), {"inputs_embeds": hidden}, 0)


def test_arguments_of_single_samples_follow_their_rows_and_no_others() -> None:
    stay = torch.tensor([True, False, True])
    mask, shared, positions = torch.randn(3, 1, 5, 5), torch.randn(3, 3), torch.arange(5).expand(3, 5)
    stages = stages_of(with_exits("gpt2"))
    flow = Flow(stages, torch.randn(3, 5, 16), (mask, shared, None), {"position_ids": positions, "x": positions}, (), {})
    assert flow.follows == [True, False, False, True, False], "three tokens, three samples: a mask (3, 3) is of all of them"
    flow.keep(stay)
    assert torch.equal(flow.beside[0], mask[stay])
    assert flow.beside[1] is shared
    assert flow.beside[2] is None
    assert flow.beside[3].shape == (2, 5)
    one = Flow(stages, torch.randn(3, 5, 16), (), {"position_ids": torch.arange(5)[None]}, (), {})
    assert one.follows == [False]


def test_costs_are_those_of_the_exits(tmp_path: Any) -> None:
    net = with_exits("sequential")
    x = torch.randn(1, 6)
    found = exit_costs(net, branches(net), ((x,), {}))
    gate = 9 * 4 + 6
    steps = [6 * 16 + 16 * 4 + gate, 16 * 4 + gate, 16 * 12 + 12 * 4 + gate, 12 * 4 + gate, 12 * 4]
    total = torch.tensor(steps, dtype=torch.float64).cumsum(0)
    assert torch.allclose(found, total / total[-1])
    assert gp.ExitRunner(net)(x).cost is None
    for branch, cost in zip(branches(net), found.tolist(), strict=False):
        branch.cost.fill_(cost)
    out = gp.ExitRunner(net)(torch.randn(5, 6))
    assert torch.allclose(out.cost, found.float()[out.exit])


def test_the_network_is_as_it_was_also_after_an_error_within() -> None:
    net = with_exits("bert")
    before, names = repr(net), list(net.state_dict())
    batch = NETS["bert"][1](4)
    runner = gp.ExitRunner(net, threshold=0.6)
    run(runner, batch)

    class Lost(RuntimeError):
        pass

    def lose(*_: Any) -> None:
        raise Lost

    handle = net.bert.pooler.register_forward_hook(lose)
    with pytest.raises(Lost):
        run(gp.ExitRunner(net, threshold=1.5), batch)
    handle.remove()
    assert repr(net) == before
    assert list(net.state_dict()) == names
    assert all("forward" not in layer.__dict__ and not layer._forward_pre_hooks for layer in net.bert.encoder.layer)
    assert torch.allclose(run(runner, batch).logits, run(gp.ExitRunner(copy.deepcopy(net), threshold=0.6), batch).logits)


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(gp.PlugError, match="needs a module with exits"):
        gp.ExitRunner(NETS["vit"][0]())
    runner = gp.ExitRunner(with_exits("sequential"))
    with pytest.raises(RuntimeError, match="for inference"):
        runner.train()(torch.randn(2, 6))
    behind = gp.ExitRunner(with_exits("convolutions"))
    behind.net.train()
    with pytest.raises(RuntimeError, match="for inference"):
        behind(torch.randn(2, 1, 8, 8))

    net = Stacked(residual=True)
    gp.EarlyExit().attach(net)
    with pytest.raises(gp.PlugError, match=r"Stacked does something between blocks\.0 and blocks\.1: .*a residual"):
        gp.ExitRunner(net)(torch.randn(2, 5, 6))

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[1](self.blocks[0](input=x)))

    net = Elsewhere()
    gp.EarlyExit().attach(net)
    with pytest.raises(gp.PlugError, match="not called with a hidden tensor first|does not run its blocks"):
        gp.ExitRunner(net)(torch.randn(2, 4))


class Masked(nn.Module):
    """Blocks that are called with what belongs to single samples, and with what belongs to all."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor, shared: Tensor, both: tuple[Tensor, Tensor] | None = None) -> Tensor:
            x = self.linear(x) * mask[..., None] + torch.einsum("bsd,st->btd", x, shared)
            return x if both is None else x * both[0][:, None, None] + both[1]

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)  # registered before the blocks
        self.blocks = nn.ModuleList([self.Block() for _ in range(3)])

    def forward(self, x: Tensor, mask: Tensor, shared: Tensor | None = None) -> Tensor:
        both = (x.mean((1, 2)), x.new_ones(1))
        mixing = torch.eye(x.shape[1]) + 0.1 * torch.arange(x.shape[1]) if shared is None else shared
        for block in self.blocks:
            x = block(x, mask, mixing, both=both)
        return self.head(x.mean(1))


def masked() -> nn.Module:
    torch.manual_seed(0)
    net = Masked()
    gp.EarlyExit().attach(net)
    for branch in branches(net):
        assert branch.head.out_features == 3, "the head, not the last block"
        nn.init.normal_(branch.gate.linear.weight, std=4.0)
    return net.eval()


def test_what_follows_the_rows_is_seen_also_where_samples_are_as_many_as_tokens() -> None:
    net = masked()
    x, mask = torch.randn(5, 5, 4), (torch.rand(5, 5) > 0.3).float()  # a mask (B, S), and mixing (S, S) of all, with B = S
    runner = gp.ExitRunner(net, threshold=0.5)
    logits, gates = runner.everything(x, mask)
    scores = E.exit_scores(gates)
    levels = scores.flatten().sort().values
    for threshold in ((levels[1:] + levels[:-1]) / 2)[levels.diff() > 1e-4].tolist():
        want = E.first_exit(scores, threshold)
        out = gp.ExitRunner(net, threshold=threshold)(x, mask)
        assert torch.equal(out.exit, want)
        assert torch.allclose(out.logits, logits[torch.arange(5), want], atol=1e-5)
    assert runner(x[:1], mask[:1]).logits.shape == (1, 3)


def test_inputs_that_belong_to_all_samples_and_have_as_many_rows_are_refused_and_not_cut() -> None:
    net = masked()
    x, mask, shared = torch.randn(5, 5, 4), torch.ones(5, 5), torch.randn(5, 5)
    with pytest.raises(gp.PlugError, match=r"was cut: argument 0, argument 1, argument 2\. Give what belongs to all samples"):
        gp.ExitRunner(net)(x, mask, shared)
    out = gp.ExitRunner(net, threshold=2.0)(x[:4], mask[:4], shared)
    assert torch.allclose(out.logits, net(x[:4], mask[:4], shared), atol=1e-5), "where the numbers differ it is told apart"


def test_a_network_that_looks_at_the_whole_batch_is_refused() -> None:
    class Centred(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head((x - x.mean(0)).mean(1))

    net = Centred()
    gp.EarlyExit().attach(net)
    with pytest.raises(gp.PlugError, match="answers otherwise for some of the rows"):
        gp.ExitRunner(net)(torch.randn(4, 5, 6))


def test_an_end_that_was_changed_is_run_as_it_is(recwarn: pytest.WarningsRecorder) -> None:
    net, batch = with_exits("vit"), NETS["vit"][1](4)
    calls: list[int] = []
    net.vit.embeddings.register_forward_hook(lambda *_: calls.append(1))
    runner = gp.ExitRunner(net, threshold=2.0)
    run(runner, batch)
    calls.clear()
    run(runner, batch)
    assert len(calls) == 1, "what comes before the blocks is paid once"
    net.register_forward_hook(lambda _, __, out: out.__class__(logits=out.logits * 2))
    changed = gp.ExitRunner(net, threshold=2.0)
    assert torch.allclose(run(changed, batch).logits, run(net, batch).logits, atol=1e-5)
    assert any("does not end as others of its class" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "resnet", "stacked"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_run_by_stages_as_well(name: str, autocast: bool, recwarn: pytest.WarningsRecorder) -> None:
    net, batch = with_exits(name), NETS[name][1](6)
    if not autocast:
        net.bfloat16()
        cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()} if isinstance(batch, dict) else None
        batch = tuple(v.bfloat16() for v in batch) if cast is None else cast
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(gp.ExitRunner(net, threshold=2.0), batch)
        want = logits_of(run(net, batch))
    assert torch.allclose(out.logits, want, atol=0.05, rtol=0.05)
    assert not [w for w in recwarn if "does not end as others" in str(w.message)]


class Scored(nn.Module):
    """Its structure does not tell how many classes there are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(6), nn.ReLU()) for _ in range(3)])
        self.score = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x @ self.score


def test_classes_that_were_given_hold_for_the_runner_as_well() -> None:
    net = Scored()
    gp.EarlyExit(classes=4).attach(net)
    x = torch.randn(5, 6)
    want = net.eval()(x)
    for runner in (gp.ExitRunner(net, threshold=2.0), gp.ExitRunner(gp.fold(net), threshold=2.0)):
        assert torch.allclose(runner(x).logits, want, atol=1e-6)
