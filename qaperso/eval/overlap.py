"""Scores of texts alone: overlap of written replies with the true ones, and variety among the written ones.

ROUGE, distinct-n: from 0 to 1. BLEU, chrF and self-BLEU: from 0 to 100, as sacrebleu gives them.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from qaperso.eval import intervals

ORDERS = 4  # of BLEU's n-grams
CHARACTER_ORDERS = 6  # of chrF's
# Pairs of replies that self-BLEU compares at most.
PAIRS = 2000

_KANA = "\u3041-\u3096\u309d\u309e\u30a1-\u30fa\u30fc-\u30fe\u31f0-\u31ff"
_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_ALONE = re.compile(f"([{_KANA}{_HAN}])")


def score(references: Sequence[str], replies: Sequence[str], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """Scores of a run's replies that single replies do not have.

    Args:
      references: the true replies, n texts; either text of a pair may be empty.
      replies: the written ones, n texts.
      groups: what is resampled together, n names.

    Returns:
      {name: {"value", "low", "high", "n"}}: bleu, chrf (of the corpus), distinct_1, distinct_2, self_bleu (of the set of
      replies). Without replies, values are NaN.
    """
    tokenizer = bleu_tokenizer(references)
    result = {"bleu": intervals.bootstrap_statistic(bleu_counts(references, replies, tokenizer), groups, bleu)}
    result["chrf"] = intervals.bootstrap_statistic(chrf_counts(references, replies), groups, chrf)
    result |= {f"distinct_{order}": distinct(replies, groups, order) for order in (1, 2)}
    return result | {"self_bleu": self_bleu(replies, groups, tokenizer)}


def compare(
    references: Sequence[str], a: Sequence[str], b: Sequence[str], groups: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Differences of two runs' BLEU and chrF against the same true replies, A - B.

    Args:
      references: the true replies, n texts.
      a, b: what the two runs wrote, n texts each, in the references' order.
      groups: what is resampled together, n names.

    Returns:
      {name: what `intervals.paired` gives} for bleu and chrf.
    """
    tokenizer, result = bleu_tokenizer(references), {}
    counts = [bleu_counts(references, x, tokenizer) for x in (a, b)]
    result["bleu"] = intervals.paired_statistic(*counts, groups, bleu, lower_is_better=False)
    counts = [chrf_counts(references, x) for x in (a, b)]
    result["chrf"] = intervals.paired_statistic(*counts, groups, chrf, lower_is_better=False)
    return result


def tokenize(text: str) -> list[str]:
    """Words in lower case, without punctuation; every Chinese or Japanese character is one by itself.

    A word is a run of letters, digits and combining marks after compatibility normalisation (NFKC), so full-width
    digits equal plain ones. On ASCII text this is rouge-score's own tokeniser, which drops all other letters and so
    gives 0 to whatever is not written with them. It is the text's characters that decide, and not its language: pairs
    of texts that mix scripts need no rule of their own. Thai, Lao, Khmer and Burmese, written without spaces too, are
    not cut.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return _ALONE.sub(r" \1 ", words).split()


class _Tokenizer:
    """`tokenize` as rouge-score takes it."""

    tokenize = staticmethod(tokenize)


def rouge(references: Sequence[str], replies: Sequence[str]) -> dict[str, np.ndarray]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) of each pair, by rouge-score without stemming.

    Tokens are those of `tokenize`. A text without any gives 0, also beside another such.

    Returns:
      {"rouge_1", "rouge_2", "rouge_l"}: float[n].
    """
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Tokenizer())
    found = [scorer.score(a, b) for a, b in zip(references, replies, strict=True)]
    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    return {ours: np.array([f[theirs].fmeasure for f in found], float) for theirs, ours in names.items()}


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's tokeniser for a corpus: "ja-mecab", "zh" or, for all else, "13a".

    Where more than half of all letters are Chinese or Japanese characters, a tenth of them in kana makes it Japanese.
    True replies alone decide, and all together, so that every run on the same data is cut alike.
    """
    text = unicodedata.normalize("NFKC", "".join(references))
    kana, han = (len(re.findall(f"[{x}]", text)) for x in (_KANA, _HAN))
    if 2 * (kana + han) <= sum(c.isalpha() for c in text):
        return "13a"
    return "ja-mecab" if 10 * kana >= kana + han else "zh"


@functools.cache
def _bleu(tokenizer: str) -> BLEU:
    # The effective order matters to single replies only (self-BLEU); counts are the same.
    return BLEU(tokenize=tokenizer, effective_order=True)


def bleu_counts(references: Sequence[str], replies: Sequence[str], tokenizer: str) -> np.ndarray:
    """What each pair adds to a corpus's BLEU (Papineni et al., 2002), by sacrebleu.

    Returns:
      float[n, 10]: tokens of the reply and of the reference; matched and all n-grams of the reply, n from 1 to 4.
    """
    found = [_bleu(tokenizer).sentence_score(b, [a]) for a, b in zip(references, replies, strict=True)]
    rows = [[f.sys_len, f.ref_len, *f.counts, *f.totals] for f in found]
    return np.array(rows, float).reshape(len(rows), 2 + 2 * ORDERS)


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU from summed counts, smoothed exponentially: sacrebleu's default for a corpus (Post, 2018).

    An order without a match counts as 1/2 match, the next such one as 1/4, and so on. No match at all gives 0, and so
    do replies that are all shorter than four tokens.

    Args:
      sums: float[r, 10], sums of `bleu_counts`.

    Returns:
      float[r], from 0 to 100.
    """
    written, expected = sums[:, 0], sums[:, 1]
    matched, total = sums[:, 2 : 2 + ORDERS], sums[:, 2 + ORDERS :]
    smoothed = np.where(matched > 0, matched, 0.5 ** np.cumsum(matched == 0, 1))
    brevity = np.minimum(0, 1 - expected / np.maximum(written, 1))
    values = 100 * np.exp(brevity + np.log(smoothed / np.maximum(total, 1)).mean(1))
    return np.where(matched.any(1) & total.all(1), values, 0.0)


def chrf_counts(references: Sequence[str], replies: Sequence[str]) -> np.ndarray:
    """What each pair adds to a corpus's chrF (Popović, 2015), counted as sacrebleu does: without white space.

    Returns:
      float[n, 18]: character n-grams of the reply, of the reference, and matched ones, n from 1 to 6 each. Those of a
      reply to a reference that has none of that order are not counted.
    """
    rows = []
    for reference, reply in zip(references, replies, strict=True):
        row = np.zeros((3, CHARACTER_ORDERS))
        for n in range(1, CHARACTER_ORDERS + 1):
            theirs, ours = (_ngrams("".join(text.split()), n) for text in (reference, reply))
            row[:, n - 1] = ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()
        rows.append(row.ravel())
    return np.array(rows).reshape(len(rows), 3 * CHARACTER_ORDERS)


def chrf(sums: np.ndarray) -> np.ndarray:
    """chrF2 from summed counts (Popović, 2015; recall weighs twice): means over orders, then F, as sacrebleu.

    Args:
      sums: float[r, 18], sums of `chrf_counts`.

    Returns:
      float[r], from 0 to 100; 0 without a match.
    """
    ours, theirs, matched = np.split(sums, 3, 1)
    there = (ours > 0) & (theirs > 0)
    precision, recall = (
        (there * matched / np.maximum(x, 1)).sum(1) / np.maximum(there.sum(1), 1) for x in (ours, theirs)
    )
    below = 4 * precision + recall
    return 100 * np.divide(5 * precision * recall, below, out=np.zeros(len(sums)), where=below > 0)


def distinct(replies: Sequence[str], groups: Sequence[str], order: int) -> dict[str, float]:
    """Distinct-n: different n-grams of all replies over their number of tokens (Li et al., 2016).

    Tokens are those of `tokenize`. More replies repeat more, so only sets of equal size compare. The interval is that
    of `intervals.jackknife` over groups: a resample with repeated groups would have fewer different n-grams.

    Args:
      replies: n texts.
      groups: what is left out together, n names.
      order: of the n-grams.

    Returns:
      {"value", "low", "high", "n"}; 0 where the replies hold no token.
    """
    names, member = np.unique(np.asarray(groups, str), return_inverse=True)
    tokens = [tokenize(text) for text in replies]
    length = np.bincount(member, [len(x) for x in tokens], len(names))
    holders: dict[tuple[str, ...], set[int]] = {}
    for group, words in zip(member.tolist(), tokens, strict=True):
        for ngram in _ngrams(words, order):
            holders.setdefault(ngram, set()).add(group)
    # An n-gram goes with a group if no other group holds it.
    alone = np.array([next(iter(held)) for held in holders.values() if len(held) == 1], int)
    lost = np.bincount(alone, minlength=len(names))
    value = len(holders) / max(length.sum(), 1) if len(replies) else float("nan")
    without = (len(holders) - lost) / np.maximum(length.sum() - length, 1)
    return intervals.jackknife(float(value), without, len(replies), (0.0, 1.0))


def self_bleu(
    replies: Sequence[str], groups: Sequence[str], tokenizer: str, pairs: int = PAIRS, seed: int = 0
) -> dict[str, float]:
    """BLEU of one reply against another, mean over pairs (after Zhu et al., 2018): high where all say the same.

    There every other reply is a reference of each, so that the score grows with their number; with one other as the
    only reference it does not (ours). The BLEU of a pair is sacrebleu's for sentences, of the orders that the reply
    has. Two replies without a token are equal: 100.

    Args:
      replies: n texts.
      groups: of the replies, n names; see `intervals.bootstrap_pairs`.
      tokenizer: of sacrebleu.
      pairs: how many ordered pairs are compared at most; equal seeds and numbers of replies give equal pairs.
      seed: of the choice of pairs.

    Returns:
      {"value", "low", "high", "n"}; NaN with fewer than two replies.
    """
    n = len(replies)
    number = n * (n - 1)
    chosen = np.arange(number)
    if number > pairs:
        chosen = np.random.default_rng(seed).choice(number, pairs, replace=False)
    first, second = np.divmod(chosen, max(n - 1, 1))
    second += second >= first

    def one(i: int, j: int) -> float:
        found = _bleu(tokenizer).sentence_score(replies[i], [replies[j]])
        return found.score if found.sys_len or found.ref_len else 100.0

    values = np.array([one(i, j) for i, j in zip(first.tolist(), second.tolist(), strict=True)], float)
    return intervals.bootstrap_pairs(values, first, second, groups)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram of words, or of a text's characters, occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
