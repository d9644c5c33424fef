"""One rule for naming layers."""

from __future__ import annotations

import pytest
import transformers as tr
from torch import nn

import gateplug as gp
from gateplug.core.select import select
from tests.modules import Net

BERT = tr.BertModel(tr.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=9))


def names(layers: object, module: nn.Module = BERT) -> list[str]:
    return list(select(module, layers, {"pooler": BERT.pooler}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ("auto", ["pooler"]),
        ("pooler", ["pooler"]),
        # a star stays inside one part: attention.output is not found
        ("encoder.layer.*.output", ["encoder.layer.0.output", "encoder.layer.1.output"]),
        ("layer.1.output", ["encoder.layer.1.output"]),
        ("intermediate.dense", ["encoder.layer.0.intermediate.dense", "encoder.layer.1.intermediate.dense"]),
        ("encoder.**.query", ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.query"]),
        ("encoder.layer.?", ["encoder.layer.0", "encoder.layer.1"]),
        (["pooler.dense", "encoder.layer.0"], ["encoder.layer.0", "pooler.dense"]),
        ("class:BertPooler", ["pooler"]),
        (lambda n, m: n.endswith("word_embeddings"), ["embeddings.word_embeddings"]),
    ],
)
def test_ways_to_name_layers(layers: object, found: list[str]) -> None:
    assert names(layers) == found


def test_classes_by_type_and_by_name_include_subclasses() -> None:
    class Special(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(2, 2), Special(2, 2), nn.ReLU())
    assert names(nn.Linear, net) == names("class:Linear", net) == ["0", "1"]
    assert names(Special, net) == ["1"]


def test_parts_of_a_name_are_matched_whole() -> None:
    with pytest.raises(gp.PlugError):
        names("ooler")


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("encoder.layr.*", "Candidates: pooler"),
        ("poolr", "Did you mean 'pooler'"),
        ("class:BertPoolr", "Did you mean 'BertPooler'"),
        (["pooler", "nothing"], "layers='nothing'"),
        (lambda n, m: False, "finds no layer"),
    ],
)
def test_what_is_not_found_is_named_with_its_neighbours(layers: object, text: str) -> None:
    with pytest.raises(gp.PlugError) as caught:
        names(layers)
    assert text in str(caught.value)


@pytest.mark.parametrize("layers", [3, None, [nn.Linear], {"a": 1}])
def test_other_kinds_are_refused(layers: object) -> None:
    with pytest.raises((TypeError, gp.PlugError)):
        names(layers)


def test_brackets_in_names_are_no_pattern() -> None:
    net = nn.ModuleDict({"a[0]": Net(), "a0": Net()})
    assert names("a[0]", net) == ["a[0]"]
