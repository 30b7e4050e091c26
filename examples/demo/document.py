"""The demo's document: held-out text with recall records in it, questions, and a continuation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

__all__ = ["MODEL_DIR", "Document", "make_document"]

MODEL_DIR = Path(__file__).parent.parent / "tiny_lm"
SEPARATOR, EQUALS, ASK = 1, 2, 3
RECORD_TOKENS, KEY_TOKENS, VALUE_TOKENS = 10, 3, 4
FIRST_FREE_TOKEN, NUM_TOKENS = 300, 4096


@dataclass(frozen=True)
class Document:
    """Token ids.

    Attributes:
        tokens: The document, whole blocks, with records written into it.
        continuation: The text that follows it.
        keys: Keys of the records, [num_records, 3].
        values: Their values, [num_records, 4].
    """

    tokens: torch.Tensor
    continuation: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def question(self, record: int) -> torch.Tensor:
        """Tokens that ask for a record."""
        ask, equals = torch.tensor([ASK]), torch.tensor([EQUALS])
        return torch.cat([ask, self.keys[record], equals])

    def prompt(self, record: int) -> torch.Tensor:
        """Tokens that ask for a record after showing, with record 0, how answers look."""
        shown = [self.question(0), self.values[0], torch.tensor([SEPARATOR])]
        return torch.cat([*shown, self.question(record)])

    def exam(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All questions with their answers in one text, and where the answers start."""
        pieces = []
        for record, value in enumerate(self.values):
            pieces += [self.question(record), value, torch.tensor([SEPARATOR])]
        starts = torch.arange(len(self.values)) * RECORD_TOKENS + KEY_TOKENS + 2
        return torch.cat(pieces), starts


def make_document(num_tokens: int, num_records: int, num_continued: int) -> Document:
    """A document of held-out text, the same every time.

    Args:
        num_tokens: Length of the document.
        num_records: Recall records written over the text at random places.
        num_continued: Length of the continuation.
    """
    text = torch.from_numpy(np.load(MODEL_DIR / "held_out_tokens.npy").astype(np.int64))
    generator = torch.Generator().manual_seed(7)
    keys = torch.randint(
        FIRST_FREE_TOKEN, NUM_TOKENS, (num_records, KEY_TOKENS), generator=generator
    )
    values = torch.randint(
        FIRST_FREE_TOKEN, NUM_TOKENS, (num_records, VALUE_TOKENS), generator=generator
    )
    tokens = text[:num_tokens].clone()
    places = torch.randperm(num_tokens // RECORD_TOKENS, generator=generator)[:num_records]
    for place, key, value in zip(places, keys, values, strict=True):
        start = int(place) * RECORD_TOKENS
        marks = [torch.tensor([mark]) for mark in (SEPARATOR, EQUALS, SEPARATOR)]
        record = torch.cat([marks[0], key, marks[1], value, marks[2]])
        tokens[start : start + RECORD_TOKENS] = record
    return Document(tokens, text[num_tokens : num_tokens + num_continued], keys, values)
