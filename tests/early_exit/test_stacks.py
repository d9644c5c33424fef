"""Which blocks a network has, where exits go, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import gateplug as gp
from gateplug.early_exit.branch import ExitBranch
from gateplug.early_exit.stacks import chosen_blocks, find_stack
from tests.early_exit.nets import NETS, TEXT, run
from tests.modules import UserModule


@pytest.mark.parametrize("name", NETS)
def test_blocks_are_found_in_order_with_their_widths(name: str) -> None:
    make, batch, blocks, widths = NETS[name]
    net = make().eval()
    stack = find_stack(net)
    assert list(stack.blocks) == blocks
    assert list(stack.widths) == widths
    assert stack.classes == 4
    inside = find_stack(UserModule(net))
    assert list(inside.blocks) == [f"net.{block}" for block in blocks]
    before, names, out = repr(net), list(net.state_dict()), run(net, batch(2))
    plug = gp.EarlyExit()
    plug.attach(net)
    assert list(plug.describe(net)) == [b for b, w in zip(blocks[:-1], widths, strict=False) if w is not None]
    for branch, width in zip((m for m in net.modules() if isinstance(m, ExitBranch)), widths, strict=False):
        assert branch.head.in_features == width
    plug.detach(net)
    assert repr(net) == before
    assert list(net.state_dict()) == names
    torch.manual_seed(0)
    assert type(run(net, batch(2))) is type(out)


def test_exits_by_number_name_and_pattern() -> None:
    net = NETS["sequential"][0]()
    stack = find_stack(net)
    assert chosen_blocks(stack, 2) == ["1", "3"]
    assert chosen_blocks(stack, None) == ["0", "1", "2", "3"]
    for at, want in ((3, ["2"]), (["0", "3"], ["0", "3"]), ("class:Tanh", ["1"]), (["class:Tanh", "class:ReLU"], ["1", "3"])):
        plug = gp.EarlyExit(at=at)
        copy = NETS["sequential"][0]()
        plug.attach(copy)
        assert list(plug.describe(copy)) == want


def test_a_pattern_in_a_list_stands_for_all_that_it_finds() -> None:
    net = NETS["bert"][0]()
    plug = gp.EarlyExit(at=["bert.encoder.layer.0", "layer.1"])
    plug.attach(net)
    assert list(plug.describe(net)) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    deeper = hf.BertForSequenceClassification(hf.BertConfig(**{**TEXT, "num_hidden_layers": 12}))
    gp.EarlyExit(at=["layer.?"]).attach(deeper)
    assert sum(isinstance(m, ExitBranch) for m in deeper.modules()) == 10, "layers 0 to 9"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def vit(**config: Any) -> nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8}
    return hf.ViTForImageClassification(hf.ViTConfig(**{**shape, "patch_size": 4, "num_channels": 1, **config}))


def mlp() -> nn.Module:
    return NETS["sequential"][0]()


BAD: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (Plain, {}, r"finds no stack of blocks: .* There are: "),
    (lambda: nn.Sequential(nn.Linear(4, 1)), {}, "has 1 layer: an exit needs a layer after it"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), {}, "gives 1 outputs .* two classes or more"),
    (lambda: vit(num_labels=1), {}, "num_labels=1, .* a number has no confidence to leave by"),
    (lambda: vit(num_labels=3, problem_type="regression"), {}, "problem_type='regression'"),
    (lambda: vit(num_labels=3, num_hidden_layers=1), {}, "has 1 block: an exit needs a block after it"),
    (mlp, {"at": ["2", "0"]}, r"at=\['2', '0'\] must name blocks in the order in which they run"),
    (mlp, {"at": ["0", "4"]}, "the last block, 4"),
    (mlp, {"at": ["0", "7"]}, "at='7' finds no layer"),
    (mlp, {"at": 6}, "at=6 puts the first exit after block 6, and there are 5 blocks"),
    (lambda: vit(num_labels=3), {"at": "vit.embeddings"}, "which are no blocks of the stack"),
    (NETS["convolutions"][0], {"at": ["3"]}, r"cannot tell the width of what 3 gives: give width=…"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), BAD)
def test_what_has_no_exits_is_refused_and_left_as_it_was(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    net = make()
    before = repr(net)
    with pytest.raises(gp.PlugError, match=message):
        gp.EarlyExit(**arguments).attach(net)
    assert repr(net) == before


def test_a_head_and_a_pool_of_ones_own() -> None:
    net = NETS["convolutions"][0]()
    plug = gp.EarlyExit(
        at=["3"], width=48, pool=lambda hidden: hidden * 2, head=lambda d, c: nn.Sequential(nn.Linear(d, 5), nn.Linear(5, c))
    )
    plug.attach(net)
    (branch,) = (m for m in net.modules() if isinstance(m, ExitBranch))
    h = torch.randn(2, 48)
    assert torch.allclose(branch.answer(h), branch.head(2 * h))
    wrong = NETS["convolutions"][0]()
    gp.EarlyExit(at=["0"], width=5).attach(wrong)
    with pytest.raises(ValueError, match=r"does not take rows of shape \(2, 8\), read of \(2, 8, 8, 8\)"):
        gp.ExitRunner(wrong)(torch.randn(2, 1, 8, 8))
