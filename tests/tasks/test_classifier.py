"""The classifier trains every kind of network on every kind of batch, and its numbers are right."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from torch import nn

from gateplug.tasks import Classifier
from tests.tasks.nets import as_tuples, loader, mlp, tiny, trainer

IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(2, 50, (12, 7), generator=torch.Generator().manual_seed(0))
WORDS[:, -1] = 1  # T5 classifies from the end-of-sentence token
LABELS = torch.arange(12) % 3


class UsersNet(nn.Module):
    """None of ours, none of Hugging Face's: two inputs, a dict out."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, pixel_values, scale=1.0):
        flat = pixel_values.flatten(1)
        return {"logits": self.left(flat) * scale + self.right(flat), "hidden": flat}


def image_samples():
    return [{"pixel_values": x, "labels": y, "index": y} for x, y in zip(IMAGES, LABELS, strict=True)]


def text_samples():
    mask = torch.ones(7, dtype=torch.long)
    return [
        {"input_ids": x, "attention_mask": mask, "token_type_ids": 0 * mask, "labels": y}
        for x, y in zip(WORDS, LABELS, strict=True)
    ]


CASES = {
    "vit": lambda: (tiny("vit", "image-classification", num_labels=3), image_samples()),
    "bert": lambda: (tiny("bert", "sequence-classification", num_labels=3), text_samples()),
    "gpt2": lambda: (tiny("gpt2", "sequence-classification", num_labels=3), text_samples()),
    "t5": lambda: (tiny("t5", "sequence-classification", num_labels=3), text_samples()),
    "users": lambda: (UsersNet(), image_samples()),
    "mlp on dicts": lambda: (mlp(64), [{"pixel_values": x, "labels": y} for x, y in as_tuples(IMAGES, LABELS)]),
    "mlp on tuples": lambda: (mlp(64), as_tuples(IMAGES, LABELS)),
    "vit on tuples": lambda: (tiny("vit", "image-classification", num_labels=3), as_tuples(IMAGES, LABELS)),
    "vit on (dict, y)": lambda: (
        tiny("vit", "image-classification", num_labels=3),
        [({"pixel_values": x}, y) for x, y in as_tuples(IMAGES, LABELS)],
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_trains_validates_tests_and_predicts(case, tmp_path):
    L.seed_everything(0)
    net, samples = CASES[case]()
    task = Classifier(net, 3, optimizer=lambda p: torch.optim.SGD(p, 0.01))
    before = [p.clone() for p in net.parameters()]
    data, run = loader(samples, 5), trainer(tmp_path, max_epochs=1)
    run.fit(task, data, data)
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/calibration_error"} <= set(run.callback_metrics)
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert set(run.test(task, data, verbose=False)[0]) == {"test/loss", "test/accuracy", "test/calibration_error"}
    predicted = run.predict(task, data)
    assert [p["probabilities"].shape for p in predicted] == [(5, 3), (5, 3), (2, 3)]
    assert torch.equal(predicted[0]["labels"], predicted[0]["probabilities"].argmax(-1))


def literal_calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3), written out."""
    confidence, guess = probabilities.max(-1)
    error = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = (guess[inside] == labels[inside]).double().mean() - confidence[inside].double().mean()
            error += float(gap.abs()) * int(inside.sum()) / len(labels)
    return error


def test_metrics_are_those_of_the_whole_set_whatever_the_batches(tmp_path):
    torch.manual_seed(1)
    net = nn.Identity()
    # Logits within [0, 1] on purpose: given as they are, torchmetrics would take them for probabilities.
    logits, labels = torch.rand(101, 3), torch.randint(0, 3, (101,))
    task = Classifier(net, 3)
    result = trainer(tmp_path).test(task, loader(as_tuples(logits, labels), 7), verbose=False)[0]
    assert result["test/accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(-1)))
    assert result["test/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    expected = literal_calibration_error(logits.softmax(-1), labels)
    assert result["test/calibration_error"] == pytest.approx(expected, abs=1e-6)


def test_the_network_never_sees_labels_and_the_loss_is_float32():
    seen = {}

    class Spy(nn.Module):
        def forward(self, **inputs):
            seen.update(inputs)
            return inputs["x"].bfloat16()

    task = Classifier(Spy(), 3)
    loss = task.training_step({"x": torch.randn(2, 3), "labels": torch.tensor([0, 2])}, 0)
    assert list(seen) == ["x"]
    assert loss.dtype == torch.float32


def test_label_smoothing_changes_the_training_loss_only(tmp_path):
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    task = Classifier(nn.Identity(), 3, label_smoothing=0.3)
    assert float(task.training_step((x, y), 0)) == pytest.approx(float(F.cross_entropy(x, y, label_smoothing=0.3)))
    result = trainer(tmp_path).test(task, loader(as_tuples(x, y), 4), verbose=False)[0]
    assert result["test/loss"] == pytest.approx(float(F.cross_entropy(x, y)), rel=1e-6)


def test_forward_gives_logits():
    net = tiny("vit", "image-classification", num_labels=3).eval()
    task = Classifier(net, 3)
    assert torch.equal(task(pixel_values=IMAGES), net(pixel_values=IMAGES).logits)


@pytest.mark.parametrize(
    ("batch", "error", "said"),
    [
        ((torch.randn(2, 4), torch.tensor([0, 1])), ValueError, r"logits of shape \(2, 4\).*must be \(batch, 3\)"),
        ((torch.randn(2, 3), torch.tensor([[0], [1]])), ValueError, r"labels of shape \(2, 1\)"),
        ((torch.randn(2, 3), torch.tensor([0, 3])), ValueError, "Labels go from 0 to 3"),
        ((torch.randn(2, 3), torch.rand(2, 3)), TypeError, "dtype torch.float32"),
        (({"x": torch.randn(2, 3)}), TypeError, "Labels are missing"),
    ],
)
def test_wrong_batches_are_refused(batch, error, said):
    with pytest.raises(error, match=said):
        Classifier(nn.Identity(), 3).training_step(batch, 0)


def test_a_wrong_label_in_a_later_batch_is_found_on_the_cpu():
    task = Classifier(nn.Identity(), 3)
    task.training_step((torch.randn(2, 3), torch.tensor([0, 1])), 0)
    with pytest.raises(ValueError, match="Labels go from 0 to 7"):
        task.training_step((torch.randn(2, 3), torch.tensor([0, 7])), 1)


def test_values_are_read_once_a_stage_where_reading_halts_a_gpu():
    task, meta = Classifier(nn.Identity(), 3), torch.empty(2, device="meta")
    assert [task.may_look("train", meta), task.may_look("train", meta), task.may_look("val", meta)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(("kwargs", "said"), [({"num_classes": 1}, "at least 2"), ({"label_smoothing": 1.0}, r"\[0, 1\)")])
def test_wrong_arguments_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        Classifier(nn.Identity(), **{"num_classes": 3, **kwargs})


def test_a_checkpoint_loads_with_weights_only(tmp_path):
    task = Classifier(mlp(), 3, optimizer=lambda p: torch.optim.AdamW(p, 1e-3))
    run = trainer(tmp_path, max_steps=1)
    run.fit(task, loader(as_tuples(torch.randn(4, 4), torch.tensor([0, 1, 2, 0])), 2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == set(mlp_keys(task))


def mlp_keys(task: Classifier) -> list[str]:
    return [f"net.{k}" for k in task.net.state_dict()]
