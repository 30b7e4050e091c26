"""Figures of one coder on one model: what reading through it changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from quality_codecs import ProfileCoder
from quality_data import VALUE_TOKENS, Recall
from quality_model import Captured, Model, attend, through_blocks
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Figures:
    """One row of the table; `_se` is the standard error over documents.

    Attributes:
        profile: what was coded.
        key_bits: stored bits per key element; value_bits likewise; bits over both.
        kl_text: mean KL(exact || coded) after tokens past the first block, milli-nats.
        perplexity_percent: increase of perplexity on the same tokens.
        kl_recall: mean KL at the tokens that predict recalled values, milli-nats.
        recall: records whose four value tokens are all most probable.
        recall_exact: the same with exact keys and values.
        logit_rms: RMS error of attention logits of earlier blocks, less each query's mean error.
        output_error: relative L2 error of attention outputs past the first block.
    """

    profile: str
    key_bits: float
    value_bits: float
    bits: float
    kl_text: float
    kl_text_se: float
    perplexity_percent: float
    perplexity_percent_se: float
    kl_recall: float
    kl_recall_se: float
    recall: float
    recall_exact: float
    logit_rms: float
    output_error: float

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


class Judge:
    """Exact distributions of the documents, and what coders do to them."""

    def __init__(self, model: Model, texts: list[Tensor], recalls: list[Recall]) -> None:
        self._model = model
        self._texts = texts
        self._recalls = recalls
        self._exact_texts = [model.log_probs(text, model.block_tokens) for text in texts]
        self._exact_recalls = [self._at_answers(document) for document in recalls]
        self._captured = model.capture(texts[0])

    def figures(self, coder: ProfileCoder) -> Figures:
        """Measures one coder."""
        text_kl, loss = [], []
        recall_kl, right, right_exact = [], [], []
        with self._model.reading(coder):
            for text, exact in zip(self._texts, self._exact_texts, strict=True):
                coded = self._model.log_probs(text, self._model.block_tokens)
                text_kl.append(_kl(exact, coded).mean())
                target = text[self._model.block_tokens + 1 :, None].to(coded.device)
                loss.append((exact[:-1].gather(1, target) - coded[:-1].gather(1, target)).mean())
            for document, exact in zip(self._recalls, self._exact_recalls, strict=True):
                coded = self._at_answers(document)
                recall_kl.append(_kl(exact, coded).mean())
                right.append(_recalled(coded, document))
                right_exact.append(_recalled(exact, document))
        logit_rms, output_error = self._attention_errors(coder)
        kl, kl_se = _mean(text_kl, 1e3)
        percent, percent_se = _mean([(x.exp() - 1) for x in loss], 1e2)
        kl_recall, kl_recall_se = _mean(recall_kl, 1e3)
        return Figures(
            profile=coder.text,
            key_bits=coder.key_bits,
            value_bits=coder.value_bits,
            bits=coder.bits,
            kl_text=kl,
            kl_text_se=kl_se,
            perplexity_percent=percent,
            perplexity_percent_se=percent_se,
            kl_recall=kl_recall,
            kl_recall_se=kl_recall_se,
            recall=_mean(right, 1.0)[0],
            recall_exact=_mean(right_exact, 1.0)[0],
            logit_rms=logit_rms,
            output_error=output_error,
        )

    def _at_answers(self, document: Recall) -> Tensor:
        start = int(document.answers.min())
        return self._model.log_probs(document.tokens, start)[document.answers.flatten() - start]

    @torch.inference_mode()
    def _attention_errors(self, coder: ProfileCoder) -> tuple[float, float]:
        squares = outputs = norms = 0.0
        for layer, given in enumerate(self._captured):
            square, output, norm = _layer_errors(coder, layer, given, self._model.block_tokens)
            squares, outputs, norms = squares + square, outputs + output, norms + norm
        return (squares / len(self._captured)) ** 0.5, (outputs / norms) ** 0.5


def _layer_errors(
    coder: ProfileCoder, layer: int, given: Captured, block_tokens: int
) -> tuple[float, float, float]:
    """Mean square logit error, squared output error, squared output norm of one layer."""
    own = given.key, given.value
    read = (
        through_blocks(coder.keys, layer, given.key, block_tokens),
        through_blocks(coder.values, layer, given.value, block_tokens),
    )
    exact_out, exact = attend(given.query, own, own, given.scaling, block_tokens)
    coded_out, coded = attend(given.query, own, read, given.scaling, block_tokens)
    square = 0.0
    starts = range(block_tokens, exact.shape[2], block_tokens)
    for start in starts:
        rows = slice(start, start + block_tokens)
        error = (coded - exact)[0, :, rows, :start]
        square += float(error.var(-1, unbiased=False).mean())
    past = slice(block_tokens, None)
    difference = coded_out[:, :, past] - exact_out[:, :, past]
    return (
        square / max(1, len(starts)),
        float(difference.square().sum()),
        float(exact_out[:, :, past].square().sum()),
    )


def _kl(exact: Tensor, coded: Tensor) -> Tensor:
    return (exact.exp() * (exact - coded)).sum(-1)


def _recalled(log_probs: Tensor, document: Recall) -> Tensor:
    best = log_probs.argmax(-1).cpu()
    wanted = document.tokens[document.answers.flatten() + 1]
    return (best == wanted).view(-1, VALUE_TOKENS).all(1).float().mean()


def _mean(numbers: list[Tensor], factor: float) -> tuple[float, float]:
    """Mean and its standard error, times `factor`; NaN for no numbers."""
    if not numbers:
        return float("nan"), float("nan")
    stacked = torch.stack([number.double().cpu() for number in numbers]) * factor
    spread = float(stacked.std()) if len(numbers) > 1 else float("nan")
    return float(stacked.mean()), spread / len(numbers) ** 0.5
