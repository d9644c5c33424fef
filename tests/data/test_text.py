"""gp.TextData on tiny folders, with bytes and with a Hugging Face tokenizer made here."""

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gateplug.data import TextData
from gateplug.data.stdlib import stdlib_texts
from gateplug.data.tokens import ByteTokens, HubTokens

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "far", "away", "from", "home"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("GATEPLUG_DATA", raising=False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tokenizer of the BERT kind: [CLS] a [SEP] b [SEP], segments 0 and 1."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    folder = tmp_path_factory.mktemp("bert")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)
    return str(folder)


def table(folder, split="train", **columns):
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def only(data):
    """The one batch of all training texts, in the data set's order."""
    rows = data.dataset("train")
    keys = torch.arange(len(rows))
    return data.augmented("train")([rows[i] for i in range(len(rows))], keys)


def test_bytes_are_framed_padded_to_a_multiple_of_8_and_masked(tmp_path):
    path = table(tmp_path / "set", text=["héllo", "a longer text"], label=[0, 1])
    batch = only(TextData(path=path, val_fraction=0.0))
    assert batch["input_ids"].shape == (2, 16)  # 13 bytes and 2 special ids, rounded up
    assert batch["attention_mask"].sum(1).tolist() == [6 + 2, 13 + 2]
    first = batch["input_ids"][0, :8].tolist()
    assert first == [259, *(b + 3 for b in "héllo".encode()), 1]
    assert (batch["input_ids"][0, 8:] == 0).all()
    assert ByteTokens().decode(first) == "héllo"
    assert batch["labels"].tolist() == [0, 1]


def test_rounding_up_does_not_go_beyond_max_length(tmp_path):
    path = table(tmp_path / "set", text=["x" * 50, "y"], label=[0, 1])
    assert only(TextData(path=path, val_fraction=0.0, max_length=13))["input_ids"].shape == (2, 13)


def test_what_is_cut_is_counted_and_reported_once(tmp_path, caplog):
    path = table(tmp_path / "set", text=["x" * n for n in (3, 8, 9, 20)], label=[0, 1, 0, 1])
    data = TextData(path=path, val_fraction=0.0, max_length=10)
    with caplog.at_level("INFO"):
        data.setup("fit")
        data.setup("fit")
    said = [r.message for r in caplog.records if "max_length" in r.message]
    assert said == ["TextData: 2 of 4 texts of the train set (50.0 %) are longer than max_length=10 tokens and were cut."]
    assert all(row[-1] == 1 for row in (r["input_ids"] for r in (data.dataset("train")[i] for i in range(4))))


def test_of_a_pair_the_longer_text_is_cut(tmp_path):
    path = table(tmp_path / "set", text=["ab", "a" * 30, "abcd"], other=["x" * 30, "xy", "wxyz"], label=[0, 1, 0])
    batch = only(TextData(path=path, text_pair="other", val_fraction=0.0, max_length=12))
    texts = [
        "".join({259: "^", 1: "$", 0: ""}.get(i) or chr(max(i - 3, 32)).strip() for i in row.tolist())
        for row in batch["input_ids"]
    ]
    assert texts == ["^ab$xxxxxxx$", "^aaaaaaa$xy$", "^abcd$wxyz$"]


def test_a_hub_tokenizer_and_its_segments(tmp_path, bert):
    path = table(tmp_path / "set", text=["the cat sat", "dog"], other=["on a mat", "run far away from home"], label=[0, 1])
    data = TextData(path=path, tokenizer=bert, text_pair="other", val_fraction=0.0, max_length=8)
    batch = only(data)
    decode = data.vocabulary.decode
    assert decode(batch["input_ids"][0].tolist()) == "[CLS] the cat [SEP] on a mat [SEP]"
    assert batch["token_type_ids"][0].tolist() == [0] * 4 + [1] * 4
    assert data.vocab_size == 20
    single = only(TextData(path=path, tokenizer=bert, val_fraction=0.0))
    assert "token_type_ids" not in single
    assert decode(single["input_ids"][1].tolist()) == "[CLS] dog [SEP] [PAD] [PAD] [PAD] [PAD] [PAD]"


def test_words_and_ids_are_taken_as_they_come(tmp_path, bert):
    path = table(tmp_path / "set", words=[["the", "cat"], ["dog"]], ids=[[5, 6, 7], [8]], label=[0, 1])
    words = only(TextData(path=path, tokenizer=bert, tokens="words", val_fraction=0.0))
    assert words["input_ids"][0, :4].tolist() == [1, 5, 6, 2]
    joined = only(TextData(path=path, tokens="words", val_fraction=0.0))
    assert ByteTokens().decode(joined["input_ids"][0].tolist()) == "the cat"
    ids = only(TextData(path=path, tokenizer=bert, tokens="ids", val_fraction=0.0))
    assert ids["input_ids"][0, :3].tolist() == [5, 6, 7]
    assert ids["attention_mask"].sum(1).tolist() == [3, 1]
    bad = table(tmp_path / "bad", ids=[[5, 99]], label=[0])
    with pytest.raises(ValueError, match=r"ids from 5 to 99 do not lie in the vocabulary .* \(0 … 19\)"):
        TextData(path=bad, tokenizer=bert, tokens="ids", val_fraction=0.0).setup("fit")


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        ([1, 0, 1], torch.tensor([1, 0, 1]), 2),
        (["pos", "neg", "pos"], torch.tensor([1, 0, 1]), 2),
        ([0.5, -1.0, 2.0], torch.tensor([0.5, -1.0, 2.0]), 1),
        ([[1, 0, 1], [0, 0, 0], [1, 1, 1]], torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), 3),
    ],
    ids=["numbers", "names", "values", "multi-label"],
)
def test_every_kind_of_label(tmp_path, labels, expected, classes):
    data = TextData(path=table(tmp_path / "set", text=["a", "b", "c"], label=labels), val_fraction=0.0)
    got = only(data)["labels"]
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype
    assert data.num_classes == classes


def test_csv_and_json_and_the_split_by_seed(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "data.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    data = TextData(path=str(tmp_path / "csv"), test_split=None, val_fraction=0.2, test_fraction=0.3)
    data.prepare_data()
    data.setup()
    assert [len(data.dataset(s)) for s in ("train", "val", "test")] == [10, 4, 6]
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "validation.jsonl").write_text('{"text": "v", "label": 0}\n')
    (tmp_path / "json" / "train.jsonl").write_text('{"text": "t", "label": 0}\n{"text": "u", "label": 1}\n')
    data = TextData(path=str(tmp_path / "json"), val_split="validation")
    data.setup("fit")
    assert [len(data.dataset(s)) for s in ("train", "val")] == [2, 1]


def test_a_text_without_tokens_still_attends_to_one(tmp_path, bert):
    path = table(tmp_path / "set", ids=[[5], []], label=[0, 1])
    batch = only(TextData(path=path, tokenizer=bert, tokens="ids", val_fraction=0.0))
    assert batch["attention_mask"].sum(1).tolist() == [1, 1]


def test_causal_labels_are_the_ids_and_nothing_at_padding(tmp_path):
    path = table(tmp_path / "set", text=["abc", "a", ""])
    batch = only(TextData(path=path, task="causal_lm", val_fraction=0.0))
    assert len(batch["input_ids"]) == 2  # an empty text has nothing to predict
    assert batch["input_ids"][0].tolist() == [100, 101, 102, 1, 0, 0, 0, 0]
    assert batch["labels"][0].tolist() == [100, 101, 102, 1, -100, -100, -100, -100]


def test_blocks_are_all_text_joined_by_end_tokens(tmp_path):
    texts = ["abcde", "fg", "hijklmn"]
    data = TextData(path=table(tmp_path / "set", text=texts), task="causal_lm", block_size=5, val_fraction=0.0)
    batch = only(data)
    joined = "".join("$" if i == 1 else chr(i - 3) for row in batch["input_ids"].tolist() for i in row if i)
    assert joined == "abcde$fg$hijklmn$"[:15]
    assert batch["attention_mask"].sum(1).tolist() == [5, 5, 5]
    long = TextData(path=table(tmp_path / "set", text=texts), task="causal_lm", block_size=50, val_fraction=0.0)
    with pytest.raises(ValueError, match="the 3 texts of the train set do not fill a block of block_size=50"):
        long.setup("fit")


def test_the_standard_library_is_text_on_every_machine():
    texts = stdlib_texts(20_000)
    assert sum(len(t.encode()) for t in texts) == 20_000
    assert texts == stdlib_texts(20_000)
    assert "import" in "".join(texts)
    data = TextData("python-stdlib", task="causal_lm", max_bytes=100_000, block_size=64, test_fraction=0.2)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (32, 64)
    assert data.vocab_size == 384
    with pytest.raises(AttributeError, match="a language model has vocab_size"):
        _ = data.num_classes


@pytest.mark.parametrize("task", ["masked_lm", "span_corruption"])
def test_what_is_hidden_depends_on_epoch_and_index_alone(task):
    def epochs(**kwargs):
        data = TextData("python-stdlib", task=task, max_bytes=8000, block_size=40, test_fraction=0.1, **kwargs)
        loader = data.train_dataloader()
        out = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            rows = [tuple(i for i in row.tolist() if i) for batch in loader for row in batch["input_ids"]]
            out.append(rows)
        return out

    one = epochs(batch_size=16)
    assert one == epochs(batch_size=5) == epochs(batch_size=16, num_workers=2)
    assert sorted(one[0]) != sorted(one[1])


def test_validation_hides_the_same_each_time():
    data = TextData("python-stdlib", task="masked_lm", max_bytes=20_000, block_size=40, val_fraction=0.3)
    loader = data.val_dataloader()
    first = list(loader)
    loader.sampler.set_epoch(1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, loader, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({}, "got neither name nor path"),
        ({"name": "a", "path": "b"}, "not both"),
        ({"name": "a", "task": "translation"}, "one of classification, causal_lm, masked_lm, span_corruption"),
        ({"name": "a", "max_length": 3}, "max_length=3.*at least 4 tokens"),
        ({"name": "a", "block_size": 64}, "block_size joins texts, which have a label each"),
        ({"name": "python-stdlib"}, "python-stdlib has no labels"),
        ({"name": "a", "task": "causal_lm", "text_pair": "b"}, "pairs go with task='classification'"),
        ({"name": "a", "max_bytes": 5}, "only for name='python-stdlib'"),
        ({"name": "a", "mask_probability": 0.0}, "mask_probability=0.0.*above 0 and below 1"),
        ({"name": "a", "noise_density": 1.0}, "noise_density=1.0"),
        ({"name": "a", "mean_span": 0.5}, "mean_span=0.5"),
        ({"name": "a", "batch_size": 0}, "batch_size=0"),
        ({"name": "a", "train_samples": 0}, "train_samples=0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text):
        TextData(**kwargs)


@pytest.mark.parametrize(
    ("columns", "kwargs", "text"),
    [
        ({"text": ["a"], "label": [0]}, {"text": "sentence"}, r"text='sentence'\): no such column; found text, label"),
        ({"text": ["a"], "label": [0]}, {"text_pair": "b"}, r"text_pair='b'\): no such column"),
        ({"text": ["a"], "label": [0]}, {"tokens": "ids"}, r"tokens='ids'\): no such column"),
        ({"text": ["a", None], "label": [0, 1]}, {}, "row 1 of split 'train' has None in column 'text'"),
        ({"text": ["a", "b"], "label": [0, 2]}, {}, "not contiguous"),
        ({"text": ["a", "b"], "label": [[0, 1], [1]]}, {}, r"row 1 .* multi-label \[1\]; it must be 2 numbers"),
        ({"text": ["a"], "label": [0]}, {"train_split": "all"}, r"no such split; found 'train' \(1 rows\)"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_what_was_found(tmp_path, columns, kwargs, text):
    data = TextData(path=table(tmp_path / "set", **columns), val_fraction=0.0, **kwargs)
    with pytest.raises(ValueError, match=text):
        data.setup("fit")


def test_a_tokenizer_that_lacks_a_token_is_refused(tmp_path, bert):
    path = table(tmp_path / "set", text=["the cat"])
    with pytest.raises(ValueError, match=r"has no sentinel tokens <extra_id_0> …. Use a tokenizer of the T5 family, or 'bytes'"):
        TextData(path=path, tokenizer=bert, task="span_corruption").prepare_data()


def test_a_missing_tokenizer_says_what_the_folder_has(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer there; the folder has weights.bin.*or 'bytes'"):
        HubTokens(str(tmp_path))
