"""Language tasks: losses equal to the models' own, perplexity over all tokens, masks and shifts."""

import math

import lightning as L
import pytest
import torch
from torch import nn

from gateplug.tasks import LanguageModel, Seq2Seq
from gateplug.tasks.language import Perplexity, token_nll
from tests.tasks.nets import loader, tiny, trainer

IDS = torch.randint(2, 50, (6, 9), generator=torch.Generator().manual_seed(3))


def samples(**more) -> list[dict]:
    mask = torch.ones_like(IDS)
    mask[::2, 6:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    return [
        {"input_ids": IDS[i], "attention_mask": mask[i], "labels": labels[i], **{k: v[i] for k, v in more.items()}}
        for i in range(len(IDS))
    ]


def batch() -> dict:
    rows = samples()
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize(
    ("architecture", "head", "make"),
    [
        ("gpt2", "causal-lm", lambda net: LanguageModel(net, "causal")),
        ("bert", "masked-lm", lambda net: LanguageModel(net, "masked")),
        ("t5", "seq2seq-lm", Seq2Seq),
    ],
)
def test_the_loss_is_the_models_own(architecture, head, make):
    net = tiny(architecture, head).eval()
    assert float(make(net).training_step(batch(), 0)) == pytest.approx(float(net(**batch()).loss), rel=1e-6)


def test_causal_labels_are_made_from_ids_and_mask():
    net = tiny("gpt2", "causal-lm").eval()
    task, full = LanguageModel(net), batch()
    without = {k: v for k, v in full.items() if k != "labels"}
    assert float(task.training_step(without, 0)) == float(task.training_step(full, 0))


def test_masked_needs_labels():
    with pytest.raises(TypeError, match="Labels are missing"):
        LanguageModel(tiny("bert", "masked-lm"), "masked").training_step({"input_ids": IDS}, 0)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_fit_test_and_predict(kind, tmp_path):
    L.seed_everything(0)
    head = {"gpt2": "causal-lm", "bert": "masked-lm", "t5": "seq2seq-lm"}[kind]
    net = tiny(kind, head)
    task = Seq2Seq(net) if kind == "t5" else LanguageModel(net, "causal" if kind == "gpt2" else "masked")
    data, run = loader(samples(token_type_ids=0 * IDS), 4), trainer(tmp_path)
    run.fit(task, data, data)
    assert {"train/loss", "train/perplexity", "val/loss", "val/perplexity"} <= set(run.callback_metrics)
    result = run.test(task, data, verbose=False)[0]
    assert result["test/perplexity"] == pytest.approx(math.exp(result["test/loss"]), rel=1e-5)
    assert all(p.shape[0] in (4, 2) and p.dtype == torch.long for p in run.predict(task, data))


class Constant(nn.Module):
    """Logits that are given as input."""

    def forward(self, input_ids):
        return input_ids


def test_perplexity_counts_every_token_once_whatever_its_batch(tmp_path):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 6, 4), torch.randint(0, 4, (5, 6))
    labels[0, 1:] = -100  # a batch of one token beside batches of many
    rows = [{"input_ids": x, "labels": y} for x, y in zip(logits, labels, strict=True)]
    task = LanguageModel(Constant(), "masked")
    result = trainer(tmp_path).test(task, loader(rows, 1), verbose=False)[0]
    flat = logits.double().log_softmax(-1).flatten(0, 1)
    kept = labels.flatten() != -100
    nll = -flat[kept].gather(1, labels.flatten()[kept][:, None]).mean()
    assert result["test/loss"] == pytest.approx(float(nll), rel=1e-5)
    assert result["test/perplexity"] == pytest.approx(float(nll.exp()), rel=1e-5)


def test_a_batch_without_targets_has_loss_zero_and_a_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    nll, tokens = token_nll(logits, torch.full((2, 3), -100))
    (nll / tokens.clamp(min=1)).backward()
    assert (float(nll), int(tokens), float(logits.grad.abs().sum())) == (0.0, 0, 0.0)
    assert float(Perplexity().compute()) == 1.0


@pytest.mark.parametrize("task", [LanguageModel(Constant(), "masked"), Seq2Seq(Constant())])
def test_wrong_labels_are_refused(task):
    with pytest.raises(ValueError, match="Labels go from 0 to 9"):
        task.training_step({"input_ids": torch.randn(1, 2, 4), "labels": torch.tensor([[0, 9]])}, 0)
    with pytest.raises(ValueError, match=r"\(1, 2, 4\) for labels of shape \(1, 3\)"):
        task.training_step({"input_ids": torch.randn(1, 2, 4), "labels": torch.tensor([[0, 1, 2]])}, 0)
    with pytest.raises(TypeError, match="Labels are missing"):
        task.training_step({"input_ids": torch.randn(1, 2, 4)}, 0)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="'causal' or 'masked', got 'span'"):
        LanguageModel(Constant(), "span")


def test_a_batch_of_decoder_inputs_is_used_as_it_is():
    net = tiny("t5", "seq2seq-lm").eval()
    full = batch()
    shifted = net.prepare_decoder_input_ids_from_labels(labels=full["labels"])
    assert float(Seq2Seq(net).training_step({**full, "decoder_input_ids": shifted}, 0)) == float(
        Seq2Seq(net).training_step(full, 0)
    )
