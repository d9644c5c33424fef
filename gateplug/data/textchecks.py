"""What TextData refuses, and what it says then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gateplug.data.tokens import ByteTokens, HubTokens

STDLIB = "python-stdlib"
TASKS = ("classification", "causal_lm", "masked_lm", "span_corruption")


def check_task(
    task: str,
    name: str | None,
    text_pair: str | None,
    tokens: str | None,
    max_length: int,
    block_size: int | None,
    max_bytes: int | None,
) -> None:
    """Raise for arguments of TextData that are out of range or do not go together."""
    if task not in TASKS:
        raise ValueError(f"TextData(task={task!r}): one of {', '.join(TASKS)}.")
    if max_length < 4 or (block_size is not None and block_size < 4):
        raise ValueError(f"TextData(max_length={max_length}, block_size={block_size}): at least 4 tokens.")
    if task == "classification" and (block_size is not None or name == STDLIB):
        what = "block_size joins texts, which have a label each" if block_size is not None else f"{STDLIB} has no labels"
        raise ValueError(f"TextData(task='classification'): {what}; use task causal_lm, masked_lm or span_corruption.")
    if text_pair is not None and (task != "classification" or tokens is not None):
        raise ValueError(f"TextData(text_pair={text_pair!r}): pairs go with task='classification' and a text column only.")
    if max_bytes is not None and name != STDLIB:
        raise ValueError(f"TextData(max_bytes={max_bytes}): only for name='{STDLIB}'; elsewhere limit train_samples.")


def check_vocabulary(vocabulary: ByteTokens | HubTokens, source: str, task: str) -> None:
    """Raise if the tokenizer lacks a token that the task needs."""
    lacks = {
        "masked_lm": "mask token" if vocabulary.mask is None else "",
        "span_corruption": "" if vocabulary.sentinels and vocabulary.end is not None else "sentinel tokens <extra_id_0> …",
        "causal_lm": "end token" if vocabulary.end is None else "",
    }.get(task)
    if lacks:
        kind = {"masked_lm": "BERT", "span_corruption": "T5", "causal_lm": "GPT-2"}[task]
        name = Path(source).name
        raise ValueError(
            f"TextData(tokenizer={source!r}, task={task!r}): {name} has no {lacks}. Use a tokenizer of the {kind} family, or "
            "'bytes'."
        )


def check_texts(column: str, texts: list[Any], rows: list[int], split: str) -> None:
    """Raise for a row that holds neither a text nor a list."""
    for text, row in zip(texts, rows, strict=False):
        if not isinstance(text, (str, list)):
            raise ValueError(
                f"TextData: row {row} of split {split!r} has {text!r} in column {column!r}; it must be a text (or, in a tokens "
                "column, a list). Remove the row or fill it."
            )
