"""Any Hugging Face text data set as a data module, for classification and for language modelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from gateplug.data.labels import LabelCode, class_names
from gateplug.data.module import ExactDataModule, Split, as_it_is, check_limits, limited, parts
from gateplug.data.source import check_columns, check_source, load_splits, pick_split
from gateplug.data.stdlib import stdlib_texts
from gateplug.data.textbatch import TextBatch, TextRows, blocks
from gateplug.data.textchecks import STDLIB, check_task, check_texts, check_vocabulary
from gateplug.data.tokens import ByteTokens, Encoded, HubTokens, Ids, tokens_from

TextTask = Literal["classification", "causal_lm", "masked_lm", "span_corruption"]


class TextData(ExactDataModule):
    """Texts from any Hugging Face data set, on the hub or in a local folder, tokenized once.

    Batches have the names of Hugging Face: ``input_ids`` and ``attention_mask`` int64 ``(batch, tokens)``, padded to the
    batch's longest text rounded up to 8, and ``labels``:

    - ``classification``: int64 ``(batch,)`` for numbers or names, float ``(batch,)`` for regression, float
      ``(batch, classes)`` for multi-label (a column of lists of 0 and 1);
    - ``causal_lm``: the ids themselves (models shift them), -100 at padding;
    - ``masked_lm``: BERT's hidden tokens, -100 elsewhere; ``span_corruption``: T5's, of a length of their own.

    What is hidden is a function of (seed, epoch, index), and in validation and test of (seed, index) alone.

    Args:
        name: Hub id; a folder of that name, or of its last part, under the environment variable ``GATEPLUG_DATA`` is used
            instead of the hub. ``python-stdlib``: the sources of Python's standard library, which need no download.
        path: Local folder of parquet, arrow, csv or json files, or one that ``save_to_disk`` wrote.
        config: Configuration of the hub data set.
        tokenizer: Folder or hub id of a Hugging Face tokenizer (or a copy under ``GATEPLUG_DATA``), or ``"bytes"`` (384 ids).
        task: What to learn, see above.
        text: Column of the texts.
        text_pair: Column of second texts, for classification; None: there is none.
        tokens: Column of lists, of words (str) or of ids (int), in place of ``text``.
        label: Column of the labels, for classification.
        max_length: Most tokens of a text, ≥ 4. Longer ones are cut; how many is reported once per split.
        block_size: For language modelling: join all texts, each closed by the end token, and cut them into blocks of so
            many tokens (≥ 4; the rest, less than a block, is dropped). None: a text is a sample.
        mask_probability: Share of hidden tokens in ``masked_lm``, in (0, 1).
        noise_density: Share of hidden tokens in ``span_corruption``, in (0, 1).
        mean_span: Mean length of a hidden span in tokens, ≥ 1.
        train_split: Name of the training split.
        val_split: Name of the validation split; None: ``val_fraction`` of the training rows, drawn by seed.
        test_split: Name of the test split; None: ``test_fraction`` of the training rows.
        val_fraction: In [0, 1); ignored with ``val_split``.
        test_fraction: In [0, 1); ignored with ``test_split``, except for ``python-stdlib``, which has no splits.
        train_samples: At most so many training texts, drawn by seed; None: all.
        max_bytes: For ``python-stdlib``: how much of it to read, in bytes; None: all, some 12 MB.
        num_classes: Number of classes; None: as declared by the data set, else the largest label + 1.
        batch_size: Texts per process and step, ≥ 1.
        seed: Of split, limit, order and hiding.
        num_workers: Processes that read, ≥ 0.

    Raises:
        ValueError: For an argument outside its range, arguments that do not go together, or a split, column or label that
            is not there; the text says what was found.
        FileNotFoundError: If the folder or tokenizer is missing, or a hub id is neither local nor can be reached.
    """

    def __init__(
        self,
        name: str | None = None,
        path: str | None = None,
        config: str | None = None,
        tokenizer: str = "bytes",
        task: TextTask = "classification",
        text: str = "text",
        text_pair: str | None = None,
        tokens: str | None = None,
        label: str = "label",
        max_length: int = 128,
        block_size: int | None = None,
        mask_probability: float = 0.15,
        noise_density: float = 0.15,
        mean_span: float = 3.0,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        train_samples: int | None = None,
        max_bytes: int | None = None,
        num_classes: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if name == STDLIB:
            val_split = test_split = None
        super().__init__(batch_size, seed, num_workers, 0.0 if val_split else val_fraction, 0.0 if test_split else test_fraction)
        check_source("TextData", name, path)
        check_limits("TextData", train_samples=train_samples, num_classes=num_classes, max_bytes=max_bytes)
        check_task(task, name, text_pair, tokens, max_length, block_size, max_bytes)
        for what, share in (("mask_probability", mask_probability), ("noise_density", noise_density)):
            if not 0 < share < 1:
                raise ValueError(f"TextData({what}={share}): a share of the tokens, above 0 and below 1.")
        if mean_span < 1:
            raise ValueError(f"TextData(mean_span={mean_span}): a length of at least 1 token.")
        self.name, self.path, self.config, self.tokenizer, self.task = name, path, config, tokenizer, task
        self.text, self.text_pair, self.tokens, self.label = text, text_pair, tokens, label
        self.max_length, self.block_size, self.max_bytes = max_length, block_size, max_bytes
        self.mask_probability, self.noise_density, self.mean_span = mask_probability, noise_density, mean_span
        self.splits: dict[Split, str | None] = {"train": train_split, "val": val_split, "test": test_split}
        self.train_samples, self._given = train_samples, num_classes
        self._source: dict[str, Any] | None = None
        self._code: LabelCode | None = None
        self._vocabulary: ByteTokens | HubTokens | None = None

    @property
    def vocabulary(self) -> ByteTokens | HubTokens:
        """The tokenizer, read at the first use."""
        if self._vocabulary is None:
            self._vocabulary = tokens_from(self.tokenizer)
            check_vocabulary(self._vocabulary, self.tokenizer, self.task)
        return self._vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self.vocabulary.vocab_size

    @property
    def num_classes(self) -> int:
        """Number of classes (1 for regression); reads the training labels if ``setup`` has not."""
        if self.task != "classification":
            raise AttributeError(f"TextData(task={self.task!r}) has no classes; a language model has vocab_size.")
        return self._labels().count

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers; empty if the data set has none."""
        return self._labels().names

    def prepare_data(self) -> None:
        """Fetch the data set and the tokenizer once per machine, and check splits and columns."""
        self._table("train")
        _ = self.vocabulary
        self._source = None  # Lightning calls this in one process; each keeps what it reads in setup

    def _table(self, split: Split) -> Any:
        if self._source is None:
            if self.name == STDLIB:
                import datasets

                texts = stdlib_texts(self.max_bytes)
                self._source = {str(self.splits["train"]): datasets.Dataset.from_dict({self.text: texts})}
            else:
                self._source = load_splits("TextData", self.name, self.path, self.config)[0]
        data = pick_split("TextData", self._source, self.splits[split] or str(self.splits["train"]), f"{split}_split")
        text = {"tokens": self.tokens} if self.tokens else {"text": self.text}
        label = self.label if self.task == "classification" else None
        check_columns("TextData", data, **text, text_pair=self.text_pair, label=label)
        return data

    def _labels(self) -> LabelCode:
        if self._code is None:
            data = self._table("train")
            names = class_names(data.features[self.label])
            self._code = LabelCode.learn("TextData", self.label, list(data[self.label]), names, self._given)
        return self._code

    def read(self, split: Split) -> TextRows | None:
        """Read a split: choose the rows, encode labels and texts."""
        data = self._table(split)
        used = self.splits[split] or str(self.splits["train"])
        rows = torch.arange(len(data))
        if self.splits[split] is None or split == "train":
            rows = parts(len(data), self.seed, self.val_fraction, self.test_fraction)[split]
        if split == "train":
            rows = limited(rows, self.train_samples, self.seed)
        if not len(rows):
            return None
        encoded = self._encode(data.select(rows.tolist()), rows, used, split)
        if self.task == "classification":
            labels = self._labels().encode("TextData", self.label, list(data[self.label]), used)[rows]
            empty = [i for i, row in enumerate(encoded.ids) if not len(row)]
            for i in empty:  # a text without any token has nothing to attend to, which gives NaN
                encoded.ids[i] = torch.tensor([self.vocabulary.pad], dtype=torch.int32).numpy()
            return TextRows(encoded.ids, encoded.segments, labels)
        closing = None if self.task == "masked_lm" and self.block_size is None else self.vocabulary.end
        ids = [row for row in encoded.ids if len(row)]
        if self.block_size is not None:
            ids = blocks(ids, self.block_size, closing)
        if not ids:
            wanted = f"a block of block_size={self.block_size} tokens" if self.block_size else "a token"
            raise ValueError(f"TextData: the {len(rows)} texts of the {split} set do not fill {wanted}.")
        return TextRows(ids, None, None)

    def _encode(self, data: Any, rows: Tensor, used: str, split: Split) -> Encoded:
        frame = self.task == "classification" or (self.task == "masked_lm" and self.block_size is None)
        # room for the end token that causal LM and span corruption add
        most = None if self.block_size else self.max_length - (self.task in ("causal_lm", "span_corruption"))
        column = self.tokens or self.text
        ids: list[Ids] = []
        segments: list[Ids] | None = None
        cut = 0
        for start in range(0, len(data), 1000):
            block = data[start : start + 1000]
            check_texts(column, block[column], rows[start:].tolist(), used)
            if self.text_pair:
                check_texts(self.text_pair, block[self.text_pair], rows[start:].tolist(), used)
            part = self._encode_block(block[column], block[self.text_pair] if self.text_pair else None, frame, most)
            ids += part.ids
            segments = None if part.segments is None else (segments or []) + part.segments
            cut += part.cut
        if cut:
            rank_zero_info(
                f"TextData: {cut} of {len(data)} texts of the {split} set ({100 * cut / len(data):.1f} %) are longer than "
                f"max_length={self.max_length} tokens and were cut."
            )
        return Encoded(ids, segments, cut)

    def _encode_block(self, texts: list[Any], pairs: list[Any] | None, frame: bool, most: int | None) -> Encoded:
        if not (self.tokens and any(len(t) and isinstance(t[0], int) for t in texts)):
            return self.vocabulary.encode(texts, pairs, frame, most)
        size = self.vocab_size
        if bad := next((t for t in texts if len(t) and not 0 <= min(t) <= max(t) < size), None):
            raise ValueError(
                f"TextData(tokens={self.tokens!r}): ids from {min(bad)} to {max(bad)} do not lie in the vocabulary of "
                f"tokenizer={self.tokenizer!r} (0 … {size - 1}): give the tokenizer that made them."
            )
        ids = [torch.tensor(list(t)[:most], dtype=torch.int32).numpy() for t in texts]
        return Encoded(ids, None, sum(most is not None and len(t) > most for t in texts))

    def collate(self, split: Split) -> Callable[[Any], Any]:
        """Items come as lists; :meth:`augmented` makes the batch, because hiding changes lengths."""
        return as_it_is

    def augmented(self, split: Split) -> Callable[[Any, Tensor], Any]:
        """Hide tokens as the task says, then pad."""
        return TextBatch(
            self.task,
            self.vocabulary,
            self.block_size or self.max_length,
            self.block_size is not None,
            self.mask_probability,
            self.noise_density,
            self.mean_span,
        )
