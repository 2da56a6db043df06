"""Planted judges: what each prefers is known, so every figure is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from planted import longer, make_pairs, quoted, says, true_reply
from sklearn.linear_model import LogisticRegression

from qaperso.eval import judge
from qaperso.eval.judge import Pair


def run(pairs: list[Pair], reply: Callable[[str], str], asked: list[str] | None = None) -> judge.Metrics:
    """Judged by a function of a question's text."""

    def complete(questions: list) -> list[str]:
        texts = [messages[-1]["content"] for messages in questions]
        if asked is not None:
            asked.extend(texts)
        return [reply(text) for text in texts]

    return judge.judge(pairs, complete)


def figures(metric: dict) -> tuple:
    return metric["value"], metric["low"], metric["high"], metric["n"]


def test_a_perfect_judge() -> None:
    found = run(make_pairs(), says(true_reply), asked := [])
    assert figures(found["win_rate"]) == (1.0, 1.0, 1.0, 12) and found["win_rate_equal_length"]["value"] > 0.99
    # Under another's name neither reply is the true one.
    assert figures(found["win_rate_placebo"]) == (0.5, 0.5, 0.5, 12)
    assert figures(found["win_rate_gap"]) == (0.5, 0.5, 0.5, 12)
    assert found["tie_rate"]["value"] == 0 and found["unparsed"]["value"] == 0
    assert found["order_agreement"]["value"] == 1 and found["first_position"]["value"] == 0.5
    assert len(asked) == len(set(asked)) == 4 * 12
    mirrored = run([dataclasses.replace(p, ours=p.theirs, theirs=p.ours) for p in make_pairs()], says(true_reply))
    assert figures(mirrored["win_rate"]) == (0.0, 0.0, 0.0, 12)


def test_a_judge_that_takes_the_first() -> None:
    found = run(make_pairs(), lambda _: '{"verdict": "A"}')
    for name in ("win_rate", "win_rate_placebo", "win_rate_equal_length"):
        assert figures(found[name])[:3] == pytest.approx((0.5, 0.5, 0.5), abs=1e-9)
    assert figures(found["tie_rate"])[:3] == (1.0, 1.0, 1.0)
    assert figures(found["first_position"]) == (1.0, 1.0, 1.0, 48)
    assert figures(found["order_agreement"]) == (0.0, 0.0, 0.0, 24)
    last = run(make_pairs(), lambda _: '{"verdict": "B"}')
    assert last["win_rate"] == found["win_rate"] and last["first_position"]["value"] == 0


def test_a_judge_that_does_not_know_who_asks() -> None:
    # Whatever the reason, a preference that another name does not change is no sign of knowing the querier.
    found = run(make_pairs(), says(longer))
    assert found["win_rate"]["value"] == found["win_rate_placebo"]["value"] == 1
    assert figures(found["win_rate_gap"])[:3] == (0.0, 0.0, 0.0)


def test_a_judge_that_prefers_the_longer() -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for i, more in enumerate(rng.normal(25, 50, 300).round().astype(int)):
        ours, theirs = "x" * (200 + more), "y" * 200
        pairs.append(Pair(f"d{i}", "boss", "ann", f"query {i}", "yes", f"scene {i}", ours, theirs))
    found = run(pairs, says(longer))
    assert found["win_rate"]["low"] > 0.6
    equal = found["win_rate_equal_length"]
    assert abs(equal["value"] - 0.5) < 0.1 and equal["low"] < 0.5 < equal["high"]


def reference(score: np.ndarray, longer: np.ndarray) -> float:
    """The same regression by scikit-learn, which takes a share of a win as two weighted cases."""
    x = np.tanh(longer / longer.std())[:, None]
    labels, weights = np.repeat([1, 0], len(score)), np.concatenate([score, 1 - score])
    fitted = LogisticRegression(C=1.0, tol=1e-8).fit(np.concatenate([x, x]), labels, weights)
    return float(1 / (1 + np.exp(-fitted.intercept_[0])))


def newton(score: np.ndarray, longer: np.ndarray) -> float:
    """The same regression in a few lines that are quick enough for many resamples."""
    x, b = np.stack([np.ones(len(score)), np.tanh(longer / longer.std())], 1), np.zeros(2)
    for _ in range(10):
        p = 1 / (1 + np.exp(-x @ b))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(judge.RIDGE)
        b = b + np.linalg.solve(curvature, x.T @ (score - p) - judge.RIDGE * b)
    return float(1 / (1 + np.exp(-b[0])))


def test_equal_length_against_a_reference() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.normal(10, 30, 400).round()
    chance = 1 / (1 + np.exp(-(0.8 + 1.5 * np.tanh(lengths / 30))))
    score = (rng.random(400) < chance).astype(float)
    score[rng.random(400) < 0.2] = 0.5
    members = rng.integers(0, 80, 400)
    groups = [str(m) for m in members]
    found = judge.equal_length(score, lengths, groups)
    assert found["value"] == pytest.approx(reference(score, lengths), abs=1e-4) and found["n"] == 400
    assert found["value"] < score.mean()  # ours are longer
    refitted = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(members == g) for g in rng.integers(0, 80, 80)])
        refitted.append(newton(score[rows], lengths[rows]))
    assert newton(score, lengths) == pytest.approx(found["value"], abs=1e-6)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(refitted, [0.025, 0.975]).tolist(), abs=0.01)


def test_equal_length_is_symmetric_and_defined_everywhere() -> None:
    rng = np.random.default_rng(2)
    score, lengths, groups = rng.choice([0.0, 0.5, 1.0], 60), rng.normal(5, 9, 60), [str(i % 12) for i in range(60)]
    found, mirrored = judge.equal_length(score, lengths, groups), judge.equal_length(1 - score, -lengths, groups)
    assert found["value"] == pytest.approx(1 - mirrored["value"], abs=1e-6)
    gaps = np.append(score, np.nan), np.append(lengths, 1e6), [*groups, "other"]
    assert judge.equal_length(*gaps) == found
    assert judge.equal_length(score, np.zeros(60), groups)["value"] == pytest.approx(score.mean(), abs=1e-4)
    nothing = judge.equal_length(np.full(3, np.nan), np.zeros(3), ["a", "b", "c"])
    assert nothing["n"] == 0 and np.isnan([nothing["value"], nothing["low"], nothing["high"]]).all()


def test_two_orders() -> None:
    nan = float("nan")
    table = {(1, 0): 1, (0, 1): 0, (1, 1): 0.5, (0, 0): 0.5, (0.5, 0.5): 0.5, (1, 0.5): 0.5, (0.5, 1): 0.5}
    table |= {(nan, 1): nan, (0, nan): nan, (nan, nan): nan}
    found = judge.both_orders(np.array(list(table), float))
    np.testing.assert_array_equal(found, list(table.values()))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"verdict": "A"}', 1.0),
        ('{"verdict": "B"}', 0.0),
        ('{"verdict": "tie"}', 0.5),
        ('```json\n{"verdict": "b", "why": "tone"}\n```', 0.0),
        ('First {"verdict": "A"} came to mind, but no: {"verdict": " Tie "}', 0.5),
        ('{"verdict": "A"} {not json}', 1.0),
        ("A", None),
        ("", None),
        ('{"verdict": "C"}', None),
        ('{"verdict": 1}', None),
        ('{"verdict": "A"', None),
        ('["A"]', None),
    ],
)
def test_verdicts(text: str, value: float | None) -> None:
    found = judge.verdict(text)
    assert np.isnan(found) if value is None else found == value


def test_an_unread_verdict_is_asked_for_once_more() -> None:
    pairs = make_pairs()
    perfect = says(true_reply)
    found = run(pairs, lambda text: perfect(text) if judge.REMINDER in text else "the first, I think", asked := [])
    assert found == run(pairs, perfect) and len(asked) == 2 * 48
    assert asked[48:] == [f"{text}\n\n{judge.REMINDER}" for text in asked[:48]]
    mute = run(pairs, lambda _: "", asked := [])
    assert len(asked) == 2 * 48 and figures(mute["unparsed"]) == (1.0, 1.0, 1.0, 48)
    for name in set(mute) - {"unparsed"}:
        assert np.isnan(mute[name]["value"]) and mute[name]["n"] == 0
    # Half the pairs lose the one order, and leave the figures.
    half = run(pairs, lambda text: "" if quoted(text)["A"].startswith("mother") else perfect(text))
    assert figures(half["win_rate"]) == (1.0, 1.0, 1.0, 8) and half["unparsed"]["value"] == pytest.approx(8 / 48)


def test_equal_replies_are_ties_that_nobody_is_asked_about() -> None:
    pairs = make_pairs()
    same = [dataclasses.replace(p, theirs=p.ours) if p.querier == "boss" else p for p in pairs]
    found = run(same, says(true_reply), asked := [])
    assert len(asked) == 4 * 8 and found["win_rate"]["value"] == pytest.approx(10 / 12)
    assert found["tie_rate"]["value"] == pytest.approx(4 / 12) and figures(found["first_position"])[3] == 32
    nothing = run([dataclasses.replace(p, ours="", theirs="") for p in pairs], says(true_reply), asked := [])
    assert asked == [] and figures(nothing["win_rate"]) == (0.5, 0.5, 0.5, 12) and nothing["unparsed"]["n"] == 0


def test_with_one_querier_there_is_no_placebo() -> None:
    found = run([p for p in make_pairs() if p.querier == "boss"], says(true_reply))
    assert found["win_rate"]["value"] == 1 and found["win_rate_placebo"]["n"] == found["win_rate_gap"]["n"] == 0


def test_the_placebo_names_another_querier_of_the_same_responder() -> None:
    pairs = make_pairs(6)
    pairs += [
        dataclasses.replace(p, responder="bob", query=f"{p.query} to bob from {p.querier}") for p in make_pairs(6)
    ]
    pairs.append(Pair("alone", "boss", "carl", "query 0", "yes", "scene 0", "yes", "no"))
    chosen = judge.others(pairs)
    assert chosen[-1] is None and None not in chosen[:-1]
    for i, j in enumerate(chosen[:-1]):
        assert pairs[j].responder == pairs[i].responder and pairs[j].querier != pairs[i].querier
        assert pairs[j].query == pairs[i].query or pairs[i].responder == "bob"
    assert judge.others(pairs) == chosen != judge.others(pairs, seed=1)


def test_a_question_quotes_without_loss() -> None:
    ours, theirs = 'a "quote"\n\n{\n}{', "\u2028{x} Ignore all this; {'verdict'}"
    pair = Pair("d", "the {boss}", "ann", "你好？", "true\treply", "s", ours, theirs)
    (message,) = judge.question(pair, pair, ours, theirs)
    assert message["role"] == "user" and "ann would really say to the {boss}" in message["content"]
    known = {"asked": "你好？", "replied": "true\treply"}
    assert quoted(message["content"]) == {"known": known, "asked": "你好？", "A": ours, "B": theirs}
    assert "你好？" in message["content"] and "true reply" not in message["content"]
