"""Documents to judge codecs on: plain text, and text with key=value records asked at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# A record is RECORD k k k EQUALS v v v v RECORD, a question ASK k k k EQUALS v v v v RECORD.
RECORD, EQUALS, ASK, FIRST_FREE_TOKEN = 1, 2, 3, 300
RECORD_TOKENS, KEY_TOKENS, VALUE_TOKENS = 10, 3, 4


@dataclass(frozen=True, slots=True)
class Recall:
    """A document with records.

    Attributes:
        tokens: int64 [T].
        answers: for each question, positions of the four tokens that predict its value.
    """

    tokens: Tensor
    answers: Tensor


def load_tokens(path: Path) -> npt.NDArray[np.int64]:
    """Returns the token ids of an .npy file, int64 [N]."""
    return np.load(path, allow_pickle=False).astype(np.int64).ravel()


def windows(tokens: npt.NDArray[np.int64], length: int, count: int) -> list[npt.NDArray[np.int64]]:
    """Returns `count` windows spread evenly over the tokens, not overlapping if they fit."""
    last = len(tokens) - length
    if last < 0:
        raise ValueError(f"{len(tokens)} tokens: expected at least {length}")
    starts = np.linspace(0, last, count).astype(np.int64)
    return [tokens[start : start + length].copy() for start in starts]


def texts(tokens: npt.NDArray[np.int64], length: int, count: int) -> list[Tensor]:
    """Returns text documents, int64 [length] each."""
    return [torch.from_numpy(window) for window in windows(tokens, length, count)]


def recalls(
    tokens: npt.NDArray[np.int64], length: int, count: int, records: int, vocabulary: int
) -> list[Recall]:
    """Returns documents with `records` records at random places, asked in another order."""
    rng = np.random.default_rng(5)
    documents = []
    for window in windows(tokens, length, count):
        answers = write_records(window, records, vocabulary, rng)
        documents.append(Recall(torch.from_numpy(window), torch.from_numpy(answers)))
    return documents


def write_records(
    window: npt.NDArray[np.int64], records: int, vocabulary: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Writes records at random places of a window, asks for all at its end in another order.

    Returns:
        For each question, positions of the four tokens that predict its value, int64 [records, 4].

    Raises:
        ValueError: records and questions do not fit.
    """
    start = len(window) - records * RECORD_TOKENS
    if start < records * RECORD_TOKENS:
        raise ValueError(f"{records} records do not fit {len(window)} tokens twice")
    keys = rng.integers(FIRST_FREE_TOKEN, vocabulary, (records, KEY_TOKENS))
    values = rng.integers(FIRST_FREE_TOKEN, vocabulary, (records, VALUE_TOKENS))
    places = rng.choice(start // RECORD_TOKENS, records, replace=False) * RECORD_TOKENS
    for place, key, value in zip(places, keys, values, strict=True):
        window[place : place + RECORD_TOKENS] = [RECORD, *key, EQUALS, *value, RECORD]
    answers = []
    for asked, index in enumerate(rng.permutation(records)):
        place = start + asked * RECORD_TOKENS
        question = [ASK, *keys[index], EQUALS, *values[index], RECORD]
        window[place : place + RECORD_TOKENS] = question
        answers.append(np.arange(VALUE_TOKENS) + place + 1 + KEY_TOKENS)
    return np.stack(answers)
