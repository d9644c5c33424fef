"""HeadMask: which outputs count, when, and what stays of it."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

import gateplug as gp
from gateplug.continual.head_gate import Masked, OutputMask, counted
from gateplug.continual.heads import HeadMask
from gateplug.data.stream import TaskStream
from tests.ddp import two_processes
from tests.modules import UserModule, vit

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu", "max_epochs": 1,
}  # fmt: skip
GROUPS = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def split(head: Any = "task", **kwargs: Any) -> TaskStream:
    """Digits 0 … 4 and 5 … 9: 3 batches each of 12, the last one shorter; 90 to validate."""
    base = Even(batch_size=kwargs.pop("batch_size", 12))
    return TaskStream(
        **{"base": base, "kind": "class_split", "num_tasks": 2, "epochs_per_task": 1, "head": head, "seed": None, **kwargs}
    )


class Even(gp.Digits):
    """6 digits of each class to train."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(val_fraction=0.05, test_fraction=0.05, **kwargs)

    def read(self, part: Any) -> Any:
        rows = super().read(part)
        if part == "train":
            labels = rows.columns["labels"]
            kept = torch.cat([(labels == c).nonzero()[:6, 0] for c in range(10)]).sort()[0]
            rows.columns = {name: column[kept] for name, column in rows.columns.items()}
        return rows


def net(outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, outputs))


def classifier(outputs: int = 10, network: nn.Module | None = None) -> gp.Classifier:
    torch.manual_seed(0)
    return gp.Classifier(network or net(outputs), outputs, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))


class Look(Callback):
    """Keeps what counted in each batch."""

    def __init__(self) -> None:
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": [], "predict": []}

    def _keep(self, stage: str, module: Any) -> None:
        (mask,) = (m for m in module.modules() if isinstance(m, OutputMask))
        self.seen[stage].append(mask.allowed.nonzero()[:, 0].tolist())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._keep("train", module)

    def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._keep("val", module)

    def on_test_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self._keep("test", module)

    def on_predict_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self._keep("predict", module)


# ---------------------------------------------------------------------- the mask


@given(
    allowed=st.lists(st.booleans(), min_size=1, max_size=9).filter(any),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_masked_logit_is_half_of_the_least_number_and_gets_no_probability(allowed: list[bool], dtype: torch.dtype) -> None:
    mask = OutputMask(len(allowed))
    mask.allow([i for i, a in enumerate(allowed) if a])
    logits = torch.randn(4, len(allowed)).to(dtype)
    out, keep = mask(logits), torch.tensor(allowed)
    assert out.dtype == dtype
    assert torch.equal(out[:, keep], logits[:, keep])
    assert (out[:, ~keep] == torch.finfo(dtype).min / 2).all()
    assert torch.equal(counted(out.float()), keep.expand(4, -1))
    p = out.float().softmax(-1)
    assert torch.equal(p[:, keep], logits[:, keep].float().softmax(-1))
    assert (p[:, ~keep] == 0).all()
    assert mask.openness().values.tolist() == [float(a) for a in allowed]
    assert mask.openness().axes == ("class",)


def test_a_masked_output_gets_no_gradient() -> None:
    mask = OutputMask(3)
    mask.allow([0, 2])
    logits = torch.randn(5, 3, requires_grad=True)
    F.cross_entropy(mask(logits), torch.tensor([0, 2, 2, 0, 2])).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 1] == 0).all()
    alone = logits.detach()[:, [0, 2]].requires_grad_()
    F.cross_entropy(alone, torch.tensor([0, 1, 1, 0, 1])).backward()
    assert torch.equal(logits.grad[:, [0, 2]], alone.grad)


def test_all_forms_of_logits_are_masked() -> None:
    mask = OutputMask(3)
    mask.allow([1])
    x = torch.randn(2, 3)
    wanted = mask(x)
    assert torch.equal(mask({"logits": x, "hidden": x})["logits"], wanted)
    assert torch.equal(mask((x, 3))[0], wanted)
    model = vit().eval()
    out = model(torch.rand(2, 1, 8, 8))
    hf = OutputMask(10)
    hf.allow([4])
    masked = hf(out)
    assert type(masked) is type(out)
    assert masked.logits is masked[0] is masked["logits"]
    assert (masked.logits.argmax(-1) == 4).all()
    with pytest.raises(TypeError, match="gives a list"):
        mask([x])
    with pytest.raises(ValueError, match="is for 3 outputs, and the network gives logits .2, 4."):
        mask(torch.randn(2, 4))
    with pytest.raises(ValueError, match="brings a loss"):
        hf(model(torch.rand(2, 1, 8, 8), labels=torch.tensor([1, 2])))


def test_by_hand_without_a_trainer() -> None:
    network, mask = net(), HeadMask()
    with pytest.raises(gp.PlugError, match="call mask.attach"):
        mask.allow(network, [0])
    mask.attach(network)
    x = torch.rand(6, 1, 8, 8)
    mask.allow(network, [2, 3])
    assert {*network(x).argmax(-1).tolist()} <= {2, 3}
    for classes in ([], [10], [-1]):
        with pytest.raises(ValueError, match=r"each of 0 … 9"):
            mask.allow(network, classes)
    folded = gp.fold(network)
    assert isinstance(folded, Masked)
    assert torch.equal(folded(x), network.eval()(x))
    assert torch.equal(torch.export.export(folded, (x,)).module()(x), folded(x))
    mask.allow(network, range(10))
    assert isinstance(gp.fold(network), nn.Sequential)
    names = set(net().state_dict())
    mask.detach(network)
    assert set(network.state_dict()) == names


def test_it_stands_on_the_network_or_on_the_last_linear_layer() -> None:
    class Two(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 4), nn.Linear(4, 3)

    one, two = classifier(), Two()
    for module, name in ((one, "net.mask"), (two, "head.mask")):
        HeadMask().attach(module)
        assert f"{name}.allowed" in module.state_dict()
    named = Two()
    HeadMask(layers="body").attach(named)
    assert named.state_dict()["body.mask.allowed"].shape == (4,)
    with pytest.raises(gp.PlugError, match="holds no Linear layer"):
        HeadMask().attach(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(gp.PlugError, match="finds no layer"):
        HeadMask(layers="decoder.*").attach(classifier())


# ---------------------------------------------------------------------- in a Trainer


def fit(stream: TaskStream, module: Any, *callbacks: Any, **kwargs: Any) -> L.Trainer:
    trainer = L.Trainer(callbacks=list(callbacks), **{**QUIET, **kwargs})
    trainer.fit(module, stream)
    return trainer


def test_with_a_head_a_task_the_outputs_of_the_batchs_task_count() -> None:
    look, module, stream = Look(), classifier(), split("task", order=[1, 0])
    trainer = fit(stream, module, HeadMask(), look, val_check_interval=3)
    assert look.seen["train"] == [GROUPS[1]] * 3 + [GROUPS[0]] * 3
    n = [length for _, length in stream.eval_lengths("val")]
    assert look.seen["val"] == [GROUPS[1]] * n[1] + [GROUPS[0]] * n[0] + [GROUPS[1]] * n[1]
    trainer.test(module, stream, verbose=False)
    n = [length for _, length in stream.eval_lengths("test")]
    assert look.seen["test"] == [GROUPS[0]] * n[0] + [GROUPS[1]] * n[1]
    trainer.predict(module, stream)
    assert look.seen["predict"] == look.seen["test"]


@pytest.mark.parametrize("forward", [False, True])
def test_with_one_growing_head_the_classes_that_were_seen_count(forward: bool) -> None:
    look, module, plug = Look(), classifier(), HeadMask()
    stream = split("class", order=[1, 0], forward=forward)
    trainer = fit(stream, module, plug, look, val_check_interval=3)
    assert look.seen["train"] == [GROUPS[1]] * 3 + [GROUPS[0] + GROUPS[1]] * 3
    n = [length for _, length in stream.eval_lengths("val")]
    first = sum(n) if forward else n[1]
    assert look.seen["val"] == [GROUPS[1]] * first + [list(range(10))] * sum(n)
    trainer.test(module, stream, verbose=False)
    assert {tuple(c) for c in look.seen["test"]} == {tuple(range(10))}


def test_what_was_seen_is_known_to_a_test_in_another_process(tmp_path: Path) -> None:
    stream, path = split("class", order=[1]), tmp_path / "one.ckpt"
    fit(stream, classifier(), HeadMask()).save_checkpoint(path)
    look, module = Look(), classifier()
    L.Trainer(**QUIET, callbacks=[HeadMask(), look]).test(
        module, split("class", order=[1]), ckpt_path=path, weights_only=True, verbose=False
    )
    assert {tuple(c) for c in look.seen["test"]} == {tuple(GROUPS[1])}
    loaded = gp.load(path, classifier(), plugs=[HeadMask()])
    assert loaded.state_dict()["net.mask.allowed"].tolist() == [False] * 5 + [True] * 5


def test_an_untrained_network_is_tested_with_all_outputs() -> None:
    look = Look()
    L.Trainer(**QUIET, callbacks=[HeadMask(), look]).test(classifier(), split("class"), verbose=False)
    assert {tuple(c) for c in look.seen["test"]} == {tuple(range(10))}


def test_training_goes_on_as_if_nothing_had_been_validated_and_checkpoints_hold_its_mask(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    module, other = classifier(), classifier()
    fit(split("task", forward=True), module, HeadMask(), saver, val_check_interval=1, enable_checkpointing=True)
    fit(split("task"), other, HeadMask(), limit_val_batches=0)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    masks = [torch.load(tmp_path / f"step={s}.ckpt", weights_only=True)["state_dict"]["net.mask.allowed"] for s in range(1, 7)]
    assert [m.nonzero()[:, 0].tolist() for m in masks] == [GROUPS[0]] * 3 + [GROUPS[1]] * 3


def test_the_other_heads_stay_as_they_were() -> None:
    """With plain SGD: what is masked gets no gradient, so the read-out of the other task does not move."""
    torch.manual_seed(0)
    module = gp.Classifier(net(20), 20, functools.partial(torch.optim.SGD, lr=0.1))
    before = module.net[-1].weight.detach().clone()
    stream = TaskStream(base=Even(), kind="permuted", num_tasks=2, epochs_per_task=2, head="task", order=[1])
    fit(stream, module, HeadMask())
    after = module.state_dict()["net.3.weight"]
    assert torch.equal(after[:10], before[:10])
    assert not torch.equal(after[10:], before[10:])


def test_a_network_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is for 20 outputs, and the network gives logits .*, 10."):
        fit(split("task", kind="permuted", seed=0), classifier(), HeadMask())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (lambda: TaskStream(base=Even(), kind="permuted", num_tasks=2, steps_per_task=1), "all tasks share all outputs"),
        (Even, "these data are none"),
    ],
)
def test_there_must_be_something_to_mask(data: Any, text: str) -> None:
    module = classifier()
    with pytest.raises(gp.PlugError, match=text):
        fit(data(), module, HeadMask())
    assert not [m for m in module.modules() if isinstance(m, OutputMask)]


def test_what_cannot_be_masked_rightly_is_refused() -> None:
    with pytest.raises(gp.PlugError, match="replayed samples are of other tasks"):
        fit(split("task"), classifier(), gp.Replay(samples=100), HeadMask())
    fit(split("class"), classifier(), gp.Replay(samples=100), HeadMask())
    smoothed = gp.Classifier(net(), 10, label_smoothing=0.1)
    with pytest.raises(gp.PlugError, match=r"label_smoothing=0.1 gives every output a share"):
        fit(split("task"), smoothed, HeadMask())


def test_a_hugging_face_network_in_a_users_module() -> None:
    class Mappings(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch["pixel_values"]), batch["labels"])

    module, look = Mappings(vit()), Look()
    fit(split("task"), module, HeadMask(), look, limit_val_batches=0)
    assert look.seen["train"] == [GROUPS[0]] * 3 + [GROUPS[1]] * 3
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(gp.fold(module)(x).logits, module.eval()(x))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_it_learns_each_task_with_its_own_head(precision: Any) -> None:
    stream = TaskStream(base=gp.Digits(), kind="class_split", num_tasks=5, epochs_per_task=4, head="task")
    trainer = fit(stream, classifier(), HeadMask(), precision=precision)
    # two classes are told apart, also after four more tasks (alone: above .97)
    assert trainer.callback_metrics["val/accuracy"] > 0.85
    assert trainer.callback_metrics["val/loss"] < 1


# ---------------------------------------------------------------------- resumed, accumulated, distributed


class Killed(RuntimeError):
    pass


class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            raise Killed


@pytest.mark.parametrize("head", ["task", "class"])
def test_killed_and_resumed_at_any_batch(head: Any, tmp_path: Path) -> None:
    def run(folder: Path, kill: int | None = None, resume: Path | None = None) -> Any:
        L.seed_everything(4, verbose=False)
        module = classifier()
        saver = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, monitor=None)
        callbacks = [gp.ExactResume(4), HeadMask(), saver, *([Kill(kill)] if kill else [])]
        trainer = L.Trainer(callbacks=callbacks, **{**QUIET, "enable_checkpointing": True}, val_check_interval=2)
        try:
            trainer.fit(module, split(head), ckpt_path=resume, weights_only=True)
        except Killed:
            return None
        return module.state_dict()

    whole = run(tmp_path / "whole")
    for at in random.Random(head).sample(range(1, 6), 3):
        folder = tmp_path / str(at)
        assert run(folder, kill=at) is None
        resumed = run(folder, resume=folder / "last.ckpt")
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_accumulation_equals_one_large_batch() -> None:
    one, parts = classifier(), classifier()
    fit(split("task", batch_size=30), one, HeadMask())
    fit(split("task", batch_size=15), parts, HeadMask(), accumulate_grad_batches=2)
    # sums of float32 in another order
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), parts.parameters(), strict=True))


def train_shared(folder: Path, devices: int) -> None:
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2} if devices == 2 else {"devices": 1}
    for head in ("task", "class"):
        module = classifier()
        fit(split(head, batch_size=10 // devices), module, gp.ExactResume(0), HeadMask(), **settings)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            torch.save(module.net.state_dict(), folder / f"{devices}-{head}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    two_processes(train_shared, tmp_path)
    train_shared(tmp_path, 1)
    for head in ("task", "class"):
        one, two = (torch.load(tmp_path / f"{n}-{head}.pt", weights_only=True) for n in (1, 2))
        assert list(one) == list(two)
        for key, value in one.items():
            assert torch.allclose(value.float(), two[key].float(), atol=1e-6, rtol=0), key


def test_two_trainers_and_a_test_between_attach_once() -> None:
    module, plug = classifier(), HeadMask()
    stream = split("task")
    trainer = fit(stream, module, plug)
    trainer.test(module, stream, verbose=False)
    names = list(module.state_dict())
    fit(split("task"), module, plug)
    fit(split("task"), module, HeadMask())
    assert list(module.state_dict()) == names
    assert sum(isinstance(m, OutputMask) for m in module.modules()) == 1


def test_one_plug_masks_one_module_after_another() -> None:
    plug, looks = HeadMask(), []
    for _ in range(2):
        looks.append(Look())
        module = classifier()
        fit(split("class", order=[1]), module, plug, looks[-1], limit_val_batches=0)
    assert looks[0].seen["train"] == looks[1].seen["train"] == [GROUPS[1]] * 3


def test_the_gates_monitor_shows_what_counts() -> None:
    module = classifier()
    HeadMask().attach(module)
    gates = {n: m for n, m in module.named_modules() if isinstance(m, gp.Gate)}
    assert [g.openness().values.tolist() for g in gates.values()] == [[1.0] * 10]
