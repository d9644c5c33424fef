"""Text to token ids: any Hugging Face tokenizer, or bytes, which need no file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gateplug.core.local import folder_or_id

Ids = NDArray[np.int32]


class Encoded(NamedTuple):
    """Texts as token ids.

    Attributes:
        ids: One integer array per text.
        segments: 0 for a text's and 1 for its pair's tokens, where the tokenizer says so.
        cut: How many texts were longer than allowed.
    """

    ids: list[Ids]
    segments: list[Ids] | None
    cut: int


class Tokens(Protocol):
    """What gateplug asks of a tokenizer."""

    vocab_size: int
    pad: int
    end: int | None  # closes a document in language modelling
    mask: int | None  # stands for a hidden token in masked language modelling
    sentinels: list[int]  # stand for hidden spans in span corruption, in order of use
    special: frozenset[int]  # are never hidden

    def encode(self, texts: Sequence[Any], pairs: Sequence[Any] | None, frame: bool, most: int | None) -> Encoded:
        """Texts (with pairs) to at most ``most`` ids each; ``frame``: with start and end tokens."""


class ByteTokens:
    """One token per UTF-8 byte: no file, no unknown character, a vocabulary of 384.

    Ids: 0 padding, 1 end, 2 mask, 3 … 258 the bytes, 259 start (``[CLS]``), 260 … 383 sentinels. The order of the first
    259 is that of ByT5 (Xue et al. 2022, arXiv 2105.13626), whose third special token is "unknown" where this is "mask".
    """

    def __init__(self) -> None:
        self.vocab_size = 384
        self.pad = 0
        self.end: int | None = 1
        self.mask: int | None = 2
        self.start = 259
        self.sentinels = list(range(260, 384))
        self.special = frozenset({0, 1, 2, *range(259, 384)})

    def encode(self, texts: Sequence[Any], pairs: Sequence[Any] | None, frame: bool, most: int | None) -> Encoded:
        """Start, bytes, end; then the pair's bytes and another end. Word lists are joined by blanks.

        Of a pair that is too long, the longer text is cut first.
        """
        ids: list[Ids] = []
        cut = 0
        extra = (3 if pairs is not None else 2) if frame else 0
        for i, text in enumerate(texts):
            first, second = self._bytes(text), None if pairs is None else self._bytes(pairs[i])
            size = len(first) + (0 if second is None else len(second))
            if most is not None and size + extra > most:
                cut += 1
                room, other = max(most - extra, 0), 0 if second is None else len(second)
                keep = max(room - other, min(len(first), (room + 1) // 2))
                first, second = first[:keep], None if second is None else second[: room - keep]
            parts = [[self.start], first, [1]] if frame else [first]
            parts += [second, [1]] if second is not None else []
            ids.append(np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]))
        return Encoded(ids, None, cut)

    def _bytes(self, text: Any) -> Ids:
        raw = (text if isinstance(text, str) else " ".join(text)).encode()
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int32) + 3

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens are left out."""
        return bytes(int(i) - 3 for i in ids if int(i) not in self.special).decode(errors="replace")


class HubTokens:
    """A Hugging Face tokenizer behind the same interface.

    Args:
        source: Folder or hub id; a copy under ``GATEPLUG_DATA`` is preferred to the hub.

    Raises:
        FileNotFoundError: If there is no tokenizer there.
        ValueError: If it has no padding token and no end token to pad with.
    """

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder_or_id(source))
        except (OSError, ValueError) as error:
            there = Path(source)
            found = f"the folder has {', '.join(sorted(p.name for p in there.iterdir())) or 'no file'}" if there.is_dir() else ""
            raise FileNotFoundError(
                f"tokenizer={source!r}: no tokenizer there; {found or f'{type(error).__name__}: {error}'}. Give the folder or "
                "hub id of a Hugging Face tokenizer, or 'bytes' for the built-in one."
            ) from error
        self.vocab_size = len(self.tokenizer)
        self.end = next((i for i in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id) if i is not None), None)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end
        if pad is None:
            raise ValueError(f"tokenizer={source!r}: it has neither a padding nor an end token; set pad_token in its files.")
        self.pad = int(pad)
        self.mask = self.tokenizer.mask_token_id
        vocabulary = self.tokenizer.get_vocab()
        self.sentinels = [vocabulary[f"<extra_id_{i}>"] for i in range(1000) if f"<extra_id_{i}>" in vocabulary]
        self.special = frozenset([*self.tokenizer.all_special_ids, *self.sentinels])

    def encode(self, texts: Sequence[Any], pairs: Sequence[Any] | None, frame: bool, most: int | None) -> Encoded:
        """Encode texts or word lists; those that are too long once more, as the tokenizer itself cuts them."""
        ids, segments = self._call(texts, pairs, frame, None)
        long = [] if most is None else [i for i, row in enumerate(ids) if len(row) > most]
        if long:
            again = self._call([texts[i] for i in long], None if pairs is None else [pairs[i] for i in long], frame, most)
            for place, i in enumerate(long):
                ids[i] = again[0][place]
                if segments is not None and again[1] is not None:
                    segments[i] = again[1][place]
        return Encoded(ids, segments, len(long))

    def _call(
        self, texts: Sequence[Any], pairs: Sequence[Any] | None, frame: bool, most: int | None
    ) -> tuple[list[Ids], list[Ids] | None]:
        out = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            is_split_into_words=not isinstance(texts[0], str),
            add_special_tokens=frame,
            truncation=most is not None,
            max_length=most,
            verbose=False,
            return_attention_mask=False,
        )
        segments = out.get("token_type_ids") if pairs is not None else None
        return [np.asarray(row, dtype=np.int32) for row in out["input_ids"]], (
            None if segments is None else [np.asarray(row, dtype=np.int32) for row in segments]
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        return str(self.tokenizer.decode(list(ids)))


def tokens_from(source: str) -> ByteTokens | HubTokens:
    """The built-in byte tokenizer for ``"bytes"``, else a Hugging Face one from a folder or the hub."""
    return ByteTokens() if source == "bytes" else HubTokens(source)
