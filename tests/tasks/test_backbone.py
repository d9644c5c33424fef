"""hf_model builds what it is asked for, from the seed alone, and refuses what transformers would swallow."""

import lightning as L
import pytest
import torch
from transformers import (
    BertForMaskedLM,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    ViTModel,
)

from gateplug.tasks import hf_model
from tests.tasks.nets import BERT, T5, VIT, tiny


@pytest.mark.parametrize(
    ("architecture", "head", "expected"),
    [
        ("vit", "image-classification", ViTForImageClassification),
        ("vit", "backbone", ViTModel),
        ("bert", "masked-lm", BertForMaskedLM),
        ("gpt2", "causal-lm", GPT2LMHeadModel),
        ("t5", "seq2seq-lm", T5ForConditionalGeneration),
    ],
)
def test_heads(architecture, head, expected):
    net = tiny(architecture, head)
    assert type(net) is expected
    assert net.training
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_config_and_labels_reach_the_network():
    net = hf_model("vit", config=VIT, num_labels=7)
    assert (net.config.hidden_size, net.config.num_hidden_layers, net.classifier.out_features) == (16, 1, 7)


def test_other_names_of_an_architecture_are_allowed():
    net = hf_model("gpt2", "causal-lm", config={"hidden_size": 16, "num_hidden_layers": 1, "n_head": 2, "vocab_size": 9})
    assert (net.config.n_embd, len(net.transformer.h)) == (16, 1)


def test_weights_are_a_function_of_the_seed():
    def weights(seed):
        L.seed_everything(seed)
        return tiny("vit", "image-classification").state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"architecture": "vitt"}, r"'vitt' is not a model type of transformers. Nearest: vit"),
        ({}, "needs `architecture`"),
        (
            {"architecture": "vit", "head": "detection"},
            "head='detection' does not exist; allowed: image-classification",
        ),
        (
            {"architecture": "vit", "head": "causal-lm"},
            "'vit' has no head 'causal-lm'.*its heads: image-classification",
        ),
        (
            {"architecture": "vit", "config": {"hiden_size": 8}},
            "'hiden_size', which ViTConfig does not know. Nearest: hidden_size",
        ),
        ({"architecture": "vit", "config": {"hidden_size": "wide"}}, "The config of 'vit' refuses"),
        (
            {"architecture": "bert", "head": "masked-lm", "num_labels": 3},
            "num_labels=3 only fits a classification head",
        ),
        ({"architecture": "clip", "config": {"text_config": {"hiden_size": 8}}}, "'text_config.hiden_size'"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        hf_model(**kwargs)


@pytest.fixture
def checkpoint(tmp_path):
    net = hf_model("bert", "sequence-classification", config=BERT, num_labels=2)
    net.bfloat16().save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert"), net


def test_a_local_checkpoint_is_loaded_in_float32(checkpoint):
    folder, stored = checkpoint
    net = hf_model(head="sequence-classification", pretrained=folder)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.classifier.weight, stored.classifier.weight.float())


def test_another_number_of_labels_gets_a_fresh_head_only(checkpoint):
    folder, stored = checkpoint
    net = hf_model(head="sequence-classification", pretrained=folder, num_labels=5, config={"hidden_dropout_prob": 0.0})
    assert net.classifier.out_features == 5
    assert net.config.hidden_dropout_prob == 0.0
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(net.state_dict()[name], stored.state_dict()[name].float())


@pytest.mark.parametrize("num_labels", [None, 5])
def test_a_size_that_does_not_fit_the_weights_is_refused(checkpoint, num_labels):
    with pytest.raises((ValueError, RuntimeError), match=r"do not fit|mismatch"):
        hf_model(
            head="sequence-classification",
            pretrained=checkpoint[0],
            num_labels=num_labels,
            config={"intermediate_size": 48},
        )


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint):
    with pytest.raises(ValueError, match="is a 'bert', not architecture='vit'"):
        hf_model("vit", pretrained=checkpoint[0])


def test_a_missing_checkpoint_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no such folder here"):
        hf_model(pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"the folder holds \[\]"):
        hf_model(pretrained=str(tmp_path))


def test_attention_and_start_token_can_be_set():
    net = tiny("t5", "seq2seq-lm")
    assert net.config.decoder_start_token_id == net.config.pad_token_id == 0
    assert hf_model("t5", "seq2seq-lm", config={**T5, "decoder_start_token_id": 5}).config.decoder_start_token_id == 5
    assert hf_model("vit", config={**VIT, "attn_implementation": "eager"}).config._attn_implementation == "eager"
