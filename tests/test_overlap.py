"""Overlap and variety of texts: the reference libraries, slow definitions, and texts by hand."""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from qaperso.eval import intervals, overlap

WORDS = ["the", "cat", "The", "sat", "on", "it's", "mat.", ",", "3.5", "a-b", "&amp;", "no", "été"]
CHINESE = ["我们", "喜欢", "猫", "和", "狗", "，", "很", "iPhone", "好。"]
JAPANESE = ["私は", "猫が", "好き", "です", "。", "犬", "ラーメン", "を", "食べる"]


def texts(words: list[str], joint: str, least: int = 0) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), min_size=least, max_size=9).map(joint.join)


def pairs(words: list[str] = WORDS, joint: str = " ") -> st.SearchStrategy[list[tuple[str, str]]]:
    """References and replies of which any may be empty."""
    return st.lists(st.tuples(texts(words, joint), texts(words, joint)), min_size=1, max_size=6)


def test_rouge_by_hand() -> None:
    references = ["the cat sat on the mat", "good day", "Good day!", "one two", "a b c d", ""]
    replies = ["the cat lay on a mat", "good day", "good day", "three", "d c b a", "something"]
    found = overlap.rouge(references, replies)
    # 4 of 6 words; "the cat" of 5 pairs; the cat on mat in order.
    np.testing.assert_allclose(found["rouge_1"], [4 / 6, 1, 1, 0, 1, 0])
    np.testing.assert_allclose(found["rouge_2"], [1 / 5, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(found["rouge_l"], [4 / 6, 1, 1, 0, 1 / 4, 0])
    # Precision 1, recall 1/2: their harmonic mean. No stemming.
    found = overlap.rouge(["two loaves here now", "walk"], ["two loaves", "walking"])
    np.testing.assert_allclose(found["rouge_1"], [2 / 3, 0])
    with pytest.raises(ValueError):
        overlap.rouge(["a"], [])


def test_rouge_of_chinese_and_japanese_by_hand() -> None:
    references = ["我喜欢猫和狗。", "私は猫が好きです", "东京123号", "Über Été"]
    replies = ["我喜欢猫和鱼!", "私は犬が好きです", "东京１２３号", "über été?"]
    found = overlap.rouge(references, replies)
    # 5 of 6 characters and 4 of 5 pairs; 7 of 8 and 5 of 7; numbers are words, full width or not.
    np.testing.assert_allclose(found["rouge_1"], [5 / 6, 7 / 8, 1, 1])
    np.testing.assert_allclose(found["rouge_2"], [4 / 5, 5 / 7, 1, 1])
    np.testing.assert_allclose(found["rouge_l"], [5 / 6, 7 / 8, 1, 1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.5, OK?", ["it", "s", "3", "5", "ok"]),
        ("我用iPhone拍照・笑", ["我", "用", "iphone", "拍", "照", "笑"]),
        ("ラーメン、々", ["ラ", "ー", "メ", "ン", "々"]),
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("cafe\u0301", ["café"]),
        ("?! …", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert overlap.tokenize(text) == expected


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(st.lists(st.tuples(st.text("abcAB 12,.'_-\n"), st.text("abcAB 12,.'_-\n")), min_size=1, max_size=4))
def test_rouge_of_ascii_is_the_library_s(given: list[tuple[str, str]]) -> None:
    references, replies = map(list, zip(*given, strict=True))
    found = overlap.rouge(references, replies)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for i, (reference, reply) in enumerate(given):
        expected = scorer.score(reference, reply)
        assert [found[k][i] for k in ("rouge_1", "rouge_2", "rouge_l")] == [x.fmeasure for x in expected.values()]


def corpus(references: list[str], replies: list[str], tokenizer: str) -> list[float]:
    """BLEU and chrF of the library."""
    metrics = BLEU(tokenize=tokenizer, force=True), CHRF()
    return [m.corpus_score(replies, [references]).score for m in metrics]


@pytest.mark.parametrize(
    ("words", "joint", "tokenizer"), [(WORDS, " ", "13a"), (CHINESE, "", "zh"), (JAPANESE, "", "ja-mecab")]
)
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(data=st.data())
def test_bleu_and_chrf_are_the_library_s(words: list[str], joint: str, tokenizer: str, data: st.DataObject) -> None:
    references, replies = map(list, zip(*data.draw(pairs(words, joint)), strict=True))
    expected = corpus(references, replies, tokenizer)
    bleu = overlap.bleu(overlap.bleu_counts(references, replies, tokenizer).sum(0)[None])[0]
    chrf = overlap.chrf(overlap.chrf_counts(references, replies).sum(0)[None])[0]
    assert [bleu, chrf] == pytest.approx(expected, abs=1e-9)


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(given=pairs(), names=st.lists(st.sampled_from("abc"), min_size=6, max_size=6))
def test_resampled_bleu_is_that_of_the_resampled_lists(given: list[tuple[str, str]], names: list[str]) -> None:
    references, replies = map(list, zip(*given, strict=True))
    groups = names[: len(given)]
    found = overlap.score(references, replies, groups)
    tokenizer = overlap.bleu_tokenizer(references)
    assert [found[k]["value"] for k in ("bleu", "chrf")] == pytest.approx(corpus(references, replies, tokenizer))
    counts = overlap.bleu_counts(references, replies, tokenizer), overlap.chrf_counts(references, replies)
    few = [intervals.bootstrap_statistic(*x, seed=3, draws=9) for x in zip(counts, (groups,) * 2, SCORES, strict=True)]
    kinds = sorted(set(groups))
    if len(kinds) == 1:
        assert math.isnan(few[0]["low"]) and math.isnan(found["bleu"]["low"])
        return
    values = []
    for pick in np.random.default_rng(3).integers(len(kinds), size=(9, len(kinds))):
        members = [i for g in pick for i, name in enumerate(groups) if name == kinds[g]]
        values.append(corpus([references[i] for i in members], [replies[i] for i in members], tokenizer))
    for metric, column in zip(few, zip(*values, strict=True), strict=True):
        assert [metric["low"], metric["high"]] == pytest.approx(np.quantile(column, [0.025, 0.975]).tolist(), abs=1e-9)


SCORES = (overlap.bleu, overlap.chrf)


def test_bleu_of_chinese_and_japanese_by_hand() -> None:
    found = overlap.score(["我喜欢猫和狗"], ["我喜欢猫和鱼"], ["a"])
    assert found["bleu"]["value"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # Six words, of which the third differs; no four in a row, which counts as half a match of three.
    found = overlap.score(["私は猫が好きです"], ["私は犬が好きです"], ["a"])
    assert found["bleu"]["value"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["我们走吧", "OK"], "zh"),
        (["了解", "今日はいい天気です"], "ja-mecab"),
        (["ｶﾗｵｹ"], "ja-mecab"),
        (["the word 猫 means cat"], "13a"),
        (["Привет"], "13a"),
        (["...", ""], "13a"),
        ([], "13a"),
    ],
)
def test_the_true_replies_choose_the_tokenizer(references: list[str], expected: str) -> None:
    assert overlap.bleu_tokenizer(references) == expected


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(given=st.lists(st.tuples(texts(WORDS, " "), st.sampled_from("abc")), min_size=1, max_size=8))
def test_distinct_is_its_definition(given: list[tuple[str, str]]) -> None:
    replies, groups = map(list, zip(*given, strict=True))

    def value(items: list[tuple[str, str]], n: int) -> float:
        tokens = [overlap.tokenize(text) for text, _ in items]
        kinds = {tuple(x[i : i + n]) for x in tokens for i in range(len(x) - n + 1)}
        return len(kinds) / max(1, sum(map(len, tokens)))

    for n in (1, 2):
        found = overlap.distinct(replies, groups, n)
        assert found["value"] == pytest.approx(value(given, n)) and found["n"] == len(given)
        without = [value([x for x in given if x[1] != g], n) for g in sorted(set(groups))]
        if len(without) == 1:
            assert math.isnan(found["low"])
            continue
        error = math.sqrt((len(without) - 1) / len(without) * sum((x - np.mean(without)) ** 2 for x in without))
        assert found["low"] == pytest.approx(max(0, found["value"] - 1.959964 * error), abs=1e-6)
        assert found["high"] == pytest.approx(min(1, found["value"] + 1.959964 * error), abs=1e-6)


def test_distinct_by_hand() -> None:
    # a b a | B c: three words of five; ab ba bc of five.
    assert overlap.distinct(["a b a", "B, c"], ["x", "y"], 1)["value"] == 3 / 5
    assert overlap.distinct(["a b a", "B, c"], ["x", "y"], 2)["value"] == 3 / 5
    assert overlap.distinct(["猫猫狗"], ["x"], 1)["value"] == 2 / 3


def test_distinct_s_interval_holds_its_expectation() -> None:
    rng, shares = np.random.default_rng(0), 1 / np.arange(1, 61)
    samples, groups = [], [str(i) for i in range(40)]
    for _ in range(60):
        words = rng.choice(60, (40, 5), p=shares / shares.sum())
        samples.append(overlap.distinct([" ".join(map(str, row)) for row in words], groups, 1))
    expected = np.mean([x["value"] for x in samples])
    inside = np.mean([x["low"] <= expected <= x["high"] for x in samples])
    assert inside >= 0.9
    # And it is no wider than it must be: the spread of the values is that of the intervals, within a half.
    width = np.mean([x["high"] - x["low"] for x in samples])
    assert width < 1.5 * 3.92 * np.std([x["value"] for x in samples])


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(replies=st.lists(texts(WORDS, " "), min_size=2, max_size=5))
def test_self_bleu_is_its_definition(replies: list[str]) -> None:
    metric, values = BLEU(effective_order=True), []
    for i, j in itertools.permutations(range(len(replies)), 2):
        same = not replies[i] and not replies[j]
        values.append(100 if same else metric.sentence_score(replies[i], [replies[j]]).score)
    found = overlap.self_bleu(replies, list(map(str, range(len(replies)))), "13a")
    assert found["value"] == pytest.approx(np.mean(values)) and found["n"] == len(replies)


def test_self_bleu_compares_as_many_pairs_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    replies, groups = [f"w{i} x" for i in range(20)], [str(i) for i in range(20)]
    seen: list[tuple[str, str]] = []

    class Counting(BLEU):
        def sentence_score(self, hypothesis: str, references: list[str]) -> object:
            seen.append((hypothesis, references[0]))
            return super().sentence_score(hypothesis, references)

    monkeypatch.setattr(overlap, "_bleu", lambda _: Counting(effective_order=True))
    for cap, seed in ((50, 0), (50, 0), (50, 1), (1000, 0)):
        overlap.self_bleu(replies, groups, "13a", cap, seed)
    runs = [seen[:50], seen[50:100], seen[100:150], seen[150:]]
    assert runs[0] == runs[1] != runs[2]
    assert all(len(set(run)) == len(run) and all(a != b for a, b in run) for run in runs)
    assert set(runs[3]) == set(itertools.permutations(replies, 2))


def test_empty_and_equal_replies() -> None:
    true = ["good day to you all", "", "who goes there now"]
    nothing = overlap.score(true, [""] * 3, list("abc"))
    assert {k: m["value"] for k, m in nothing.items() if k != "self_bleu"} == dict.fromkeys(
        nothing.keys() - {"self_bleu"}, 0
    )
    assert (nothing["self_bleu"]["value"], nothing["self_bleu"]["low"], nothing["self_bleu"]["high"]) == (100, 100, 100)
    same = overlap.score(true, ["one and the same"] * 3, list("abc"))
    assert same["self_bleu"]["value"] == same["self_bleu"]["low"] == pytest.approx(100)
    assert (same["distinct_1"]["value"], same["distinct_2"]["value"]) == (4 / 12, 3 / 12)
    right = overlap.score(true, true, list("abc"))
    assert [right[k]["value"] for k in ("bleu", "chrf")] == pytest.approx([100, 100])


def test_one_reply_and_none(recwarn: pytest.WarningsRecorder) -> None:
    one = overlap.score(["good day to you"], ["good day to you"], ["a"])
    assert all(math.isnan(m["low"]) and math.isnan(m["high"]) and m["n"] == 1 for m in one.values())
    assert math.isnan(one.pop("self_bleu")["value"])
    expected = dict(bleu=100, chrf=100, distinct_1=1, distinct_2=3 / 4)
    assert {k: m["value"] for k, m in one.items()} == pytest.approx(expected)
    none = overlap.score([], [], [])
    assert len(none) == 5 and all(math.isnan(m["value"]) and m["n"] == 0 for m in none.values())
    assert not recwarn.list


def test_comparing_runs() -> None:
    true = [f"word{i} and some more words" for i in range(12)]
    groups = [str(i) for i in range(12)]
    worse = [f"other{i} and some more" for i in range(12)]
    found = overlap.compare(true, true, worse, groups)
    scores = [overlap.score(true, x, groups) for x in (true, worse)]
    assert set(found) == {"bleu", "chrf"}
    for name, metric in found.items():
        assert metric["value"] == pytest.approx(scores[0][name]["value"] - scores[1][name]["value"])
        assert metric["better"] is True and metric["p"] < 0.01
        assert metric["low"] <= metric["value"] + 1e-9 and metric["value"] <= metric["high"] + 1e-9
    back = overlap.compare(true, worse, true, groups)
    assert all(back[k]["value"] == -m["value"] and back[k]["better"] is False for k, m in found.items())
    level = overlap.compare(true, worse, worse, groups)
    assert all((m["value"], m["p"], m["better"]) == (0, 1, None) for m in level.values())
