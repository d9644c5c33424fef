"""Each form of a batch reaches the network, and each wrong one is refused with what to do."""

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from gateplug.tasks.batch import call_net, check_integer_labels, logits_of, split_batch

X, Y = torch.ones(2, 3), torch.tensor([0, 1])


class TwoInputs(nn.Module):
    def forward(self, first, second):
        return first + 10 * second


class AnyInputs(nn.Module):
    def forward(self, **inputs):
        return sorted(inputs)


class LikeHuggingFace(nn.Module):
    main_input_name = "input_ids"

    def forward(self, input_ids, **kwargs):
        return sorted(kwargs)


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X, "labels": Y},
        {"x": X, "label": Y},
        (X, Y),
        [X, Y],
        ({"x": X}, Y),
        ((X,), Y),
        BatchEncoding({"x": X, "labels": Y}),
    ],
)
def test_every_form_gives_inputs_and_labels(batch):
    parts = split_batch(batch)
    assert parts.labels is Y
    assert call_net(nn.Identity(), parts) is X


def test_a_tensor_alone_has_no_labels():
    assert split_batch(X).labels is None


@pytest.mark.parametrize(("batch", "said"), [((X, Y, Y), "tuple of 3"), ("text", "str"), (None, "NoneType")])
def test_other_forms_are_refused(batch, said):
    with pytest.raises(TypeError, match=f"The batch is a {said}; allowed are a dict with the key 'labels'"):
        split_batch(batch)


def test_inputs_go_by_name_and_unknown_columns_are_left_out():
    batch = split_batch({"second": X, "first": X, "index": Y, "labels": Y})
    assert torch.equal(call_net(TwoInputs(), batch), 11 * X)


def test_a_tuple_of_inputs_goes_by_position():
    assert torch.equal(call_net(TwoInputs(), split_batch(((X, 2 * X), Y))), 21 * X)


def test_a_network_with_kwargs_gets_all_but_a_hugging_face_one_only_what_it_names():
    assert call_net(AnyInputs(), split_batch({"a": X, "b": X})) == ["a", "b"]
    assert call_net(LikeHuggingFace(), split_batch({"input_ids": X, "token_type_ids": X})) == []


def test_a_compiled_network_is_asked_for_its_own_names():
    compiled = torch.compile(TwoInputs(), backend="eager")
    batch = split_batch({"first": X, "second": X, "index": Y})
    assert torch.equal(call_net(compiled, batch), 11 * X)


def test_names_that_fit_nothing_are_listed():
    with pytest.raises(TypeError, match=r"TwoInputs.forward accepts \['first', 'second'\] but the batch has \['a', 'b'\]"):
        call_net(TwoInputs(), split_batch({"a": X, "b": X}))


def test_logits_come_from_a_tensor_a_dict_or_an_attribute():
    class Output:
        logits = X

    assert logits_of(X) is logits_of({"logits": X}) is logits_of(Output()) is X


def test_an_output_without_logits_is_refused():
    with pytest.raises(TypeError, match=r"returned a dict with the keys \['hidden'\], without logits"):
        logits_of({"hidden": X})


@pytest.mark.parametrize(
    ("labels", "error", "said"),
    [
        (None, TypeError, "Labels are missing"),
        ([0, 1], TypeError, "Labels are a list"),
        (torch.rand(2), TypeError, "dtype torch.float32"),
        (torch.rand(2, 3), TypeError, "multi-label"),
        (torch.tensor([0, 3]), ValueError, "Labels go from 0 to 3, but must lie in 0 … 2"),
        (torch.tensor([-1, 2]), ValueError, "Labels go from -1 to 2"),
        (torch.tensor([-100, 2]), ValueError, "Labels go from -100"),
    ],
)
def test_wrong_labels_are_refused(labels, error, said):
    with pytest.raises(error, match=said):
        check_integer_labels(labels, 3)


def test_an_ignored_label_is_allowed_where_it_means_no_target():
    check_integer_labels(torch.tensor([-100, 2]), 3, ignore=-100)
    check_integer_labels(torch.tensor([-100, -100]), 3, ignore=-100)
