"""The page: one file that needs no other, in which nothing that people or models say is markup."""

from __future__ import annotations

import dataclasses
import functools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from qaperso.errors import UserError
from qaperso.eval import page, plots
from qaperso.eval.page import Across, Failure, Report
from qaperso.eval.plots import Map

EVIL = "<script>alert(1)</script>"
NAN = float("nan")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Parsed(HTMLParser):
    """A page's elements, those of its plots apart, and the text of each section; every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.drawn: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
            self.sections[self.section] = ""

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        if "svg" in self.open:
            self.drawn.add(tag)
        else:
            self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.section:
            self.sections[self.section] += data


def metric(value: float, low: float | None = NAN, high: float | None = NAN, n: int = 9) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


def full(name: str = "tilda", said: str = "good day") -> Report:
    """A report with every part; `name` is a querier's, `said` a model's text."""
    rng = np.random.default_rng(0)
    found = Failure("d1", name, said, said, said, "7.31 nats per token")
    return Report(
        title=f"run of {name}",
        summary={"method": "qar", "base": name},
        config=[("batch.rows", "8", False), ("base", name, True)],
        notes=[f"No swap gap for {name}."],
        metrics={f"{name} @3": {"reply_nll": metric(1.25, 1.125, 1.5)}, "other": {"new_score": metric(0.5)}},
        against={f"{name} \u2212 other": {"reply_nll": metric(-0.25, -0.5, -0.125)}},
        curves={
            "lm": [(1, 4.0), (2, 3.0)],
            "loss": [(1, 5.0), (2, 4.5)],
            "contrast": [(1, 2.0)],
            "dev_nll": [(0, 4.5)],
        },
        chosen=2,
        swap={name: metric(0.25, 0.125, 0.375), "harald": metric(-0.5), "nobody": metric(NAN)},
        unseen={1: metric(0.25, 0.125, 0.375, 3), 5: metric(0.5), 20: metric(NAN)},
        maps=[Map(3, "PCA", rng.normal(size=(8, 2)), [name, "harald"] * 4)],
        across=[Across(said, "maren", name, said, {name: said, "harald": ""})],
        clusters=[{"cluster": 3, "size": 5, "queriers": 2, "terms": ["bread", said], "examples": [said, "any?"]}],
        failures={"Least likely": [found, dataclasses.replace(found, reply=None)]},
        lengths=([0, 3, 4], [5, 3, 40]),
    )


PARTS = [part for _, _, part in page.SECTIONS]


@functools.cache
def whole() -> str:
    """The page of `full()`."""
    return page.render(full())


def test_every_part_has_its_section_and_the_contents_name_it() -> None:
    text = whole()
    parsed = Parsed(text)
    assert list(parsed.sections) == [name for name, _, _ in page.SECTIONS]
    assert re.findall(r'<li><a href="#(\w+)">', text) == list(parsed.sections)
    for name, heading, _ in page.SECTIONS:
        assert heading in parsed.sections[name]
    held = {
        "run": ["method", "qar", "tilda"],
        "metrics": ["tilda @3", "1.250", "1.125 to 1.500, n = 9", "nats per token", "new_score", "0.500", "n = 9"],
        "against": ["tilda \u2212 other", "-0.250", "-0.500 to -0.125", "below 0"],
        "curves": ["step", "nats per token", "training", "dev"],
        "swap": ["tilda (9)", "harald (9)", "swap gap, nats per reply token"],
        "unseen": ["gain, nats per reply token", "dialogues that a row is fitted on"],
        "embeddings": ["Cluster 3: 8 dialogues", "PCA 1 (no unit)", "tilda", "harald"],
        "across": ["good day", "tilda really asked maren this", "harald", "nothing"],
        "clusters": ["bread, good day", "any?"],
        "failures": ["Least likely", "7.31 nats per token", "dialogue d1", "good day", "not asked"],
        "lengths": ["words in a reply", "number of replies", "true replies"],
        "config": ["1 differ from their defaults", "batch.rows"],
    }
    for name, parts in held.items():
        assert [part for part in parts if part not in parsed.sections[name]] == []
    assert "nobody (" not in parsed.sections["swap"]
    assert '<p class="note">No swap gap for tilda.</p>' in text


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_there_leaves_nothing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_svg", lambda *_: "<svg></svg>")  # drawing takes most of the time
    section = {p: name for name, _, p in page.SECTIONS}[part]
    empty = getattr(Report("x"), part)
    parsed = Parsed(page.render(dataclasses.replace(full(), **{part: empty})))
    assert list(parsed.sections) == [name for name, _, _ in page.SECTIONS if name != section]


def test_a_report_of_nothing_is_a_page() -> None:
    parsed = Parsed(page.render(Report("nothing")))
    assert not parsed.sections and "h1" in parsed.tags


def test_the_page_needs_no_other_file() -> None:
    parsed = Parsed(whole())
    ids = [v for k, v in parsed.attributes if k == "id"]
    assert len(ids) == len(set(ids)) > 20
    links = [v for k, v in parsed.attributes if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
    assert links and all(v.startswith("#") and v[1:] in ids for v in links)
    used = [m for _, v in parsed.attributes for m in re.findall(r"url\(([^)]*)\)", v)]
    assert used and all(m.startswith("#") and m[1:] in ids for m in used)
    assert not {"script", "link", "iframe", "object", "embed", "img", "image"} & {*parsed.tags, *parsed.drawn}
    assert not [k for k, _ in parsed.attributes if k.startswith("on")]
    assert "@import" not in whole() and parsed.tags.count("style") == 1
    assert "style" not in parsed.drawn


@pytest.mark.parametrize("evil", [EVIL, '"><b id=x>&amp;', "$\\frac$ {{7*7}}", "--> ]]> \x01 \ud800 \u674e"])
def test_what_people_and_models_say_is_no_markup(evil: str, tmp_path: Path) -> None:
    page.write(full(evil, evil), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed, plain = Parsed(text), Parsed(whole())
    assert (
        parsed.tags == plain.tags
        and parsed.drawn == plain.drawn
        and "<script" not in text
        and "49" not in parsed.sections["across"]
    )
    # As text it is there, to the last character that a file may hold.
    said = evil.encode(errors="replace").decode()
    for name in ("run", "metrics", "against", "across", "clusters", "failures", "config"):
        assert said in parsed.sections[name]
    shown = "".join(c for c in evil if c.isprintable())[:12]
    assert shown in parsed.sections["swap"] and shown in parsed.sections["embeddings"]


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page.write(Report("one"), tmp_path / "a.html")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(UserError, match="cannot be written"):
        page.write(Report("two"), tmp_path / "absent" / "a.html")


def test_cells() -> None:
    assert (page.number(None), page.number(metric(NAN)), page.number(metric(0.12345))) == ("\u2013", "\u2013", "0.123")
    assert page.interval(metric(1.0, 0.5, 2.0, 7)) == "0.500 to 2.000, n = 7"
    assert page.interval(metric(1.0, None, None, 7)) == "n = 7" and page.interval(None) == ""
    assert page.interval({"value": None, "low": None, "high": None, "n": 0, "note": "no power"}) == "no power"
    found = [
        page.verdict(metric(0.0, *bounds)) for bounds in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1), (NAN, NAN))
    ]
    assert found == ["above 0", "below 0", "includes 0", "includes 0", ""]


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def labels(text: str) -> list[str]:
    return [e.text or "" for e in svg(text).iter(f"{{{plots.SVG}}}text")]


def test_plots_are_equal_for_equal_data_and_follow_the_page_s_colours() -> None:
    draw = [plots.length_histogram(name, [1, 2], [2, 9]) for name in ("a", "a", "b")]
    assert draw[0] == draw[1] != draw[2] == draw[0].replace('"a-', '"b-').replace("#a-", "#b-")
    for colour in (plots.INK, plots.LINE):
        assert colour not in draw[0]
    assert "currentColor" in draw[0] and "var(--line)" in draw[0] and "var(--c0, #0072b2)" in draw[0]
    root = svg(draw[0])
    assert root.get("viewBox") and root.get("width") is None and root.get("aria-label") == "Lengths of replies"


def test_bars_are_in_order_of_their_values() -> None:
    metrics = {"low": metric(-1.0), "top": metric(2.0, 1.0, 3.0), "mid": metric(0.5, 0.0, 1.0), "none": metric(NAN)}
    found = [t for t in labels(plots.interval_bars("x", "Gap", "nats", metrics)) if "(" in t]
    assert found == ["low (9)", "mid (9)", "top (9)"]  # from the bottom up
    many = {f"q{i:03}": metric(float(i), n=i) for i in range(100)}
    found = labels(plots.interval_bars("x", "Gap", "nats", many))
    assert "Gap (40 of 100)" in found and "q099 (99)" in found and "q059 (59)" not in found


def test_the_curve_of_unseen_queriers_begins_at_nothing_given() -> None:
    found = labels(plots.gain_curve("x", {1: metric(0.25, 0.125, 0.375), 5: metric(0.5), 20: metric(NAN)}))
    assert [t for t in found if t in ("0", "1", "5", "20")] == ["0", "1", "5"]


def test_maps_name_the_most_frequent_queriers() -> None:
    queriers = [f"_{i:02}" for i in range(22) for _ in range(22 - i)]
    points = np.random.default_rng(0).normal(size=(len(queriers), 2))
    found = labels(plots.embedding_maps("x", [Map(3, "t-SNE", points, queriers)]))
    names = [t for t in found if re.fullmatch(r"_\d\d", t)]
    assert names == [f"_{i:02}" for i in range(plots.NAMED)] and "others" in found
    found = labels(plots.embedding_maps("x", [Map(i, "PCA", points[:4], ["a", "b"] * 2) for i in range(9)]))
    assert [t for t in found if t.startswith("Cluster")] == [f"Cluster {i}: 4 dialogues" for i in range(plots.PANELS)]
    assert "others" not in found


def test_curves_leave_out_what_the_total_loss_does_not_add() -> None:
    curves = {"loss": [(1, 2.0)], "lm": [(1, 2.0)], "dev_nll": [(1, 3.0)]}
    assert "total loss" not in labels(plots.learning_curves("x", curves, None))
    found = labels(plots.learning_curves("x", curves | {"contrast": [(1, 1.0)]}, 1))
    assert {"total loss", "contrast", "training, labels", "dev, replies", "checkpoint scored", "step"} <= set(found)


def test_a_map_names_everybody_and_marks_some() -> None:
    places = {"tilda": [0.0, 1.0], "$x$ <b>": [-1.0, 0.5], "stranger": [2.0, -0.5]}
    found = plots.querier_map("x", places, ["stranger"])
    assert {*places, "Queriers by their learned rows"} <= set(labels(found))
    plain = plots.querier_map("x", places)
    for text, marks in ((found, 1), (plain, 0)):
        assert sum("--c1" in (e.get("style") or "") for e in svg(text).iter(f"{{{plots.SVG}}}use")) == marks


def test_a_plot_alone_has_a_size_and_colours_of_its_own() -> None:
    plot = plots.gain_curve("x", {1: metric(0.25)})
    root = svg(plots.alone(plot))
    assert root.get("viewBox") == f"0 0 {root.get('width')[:-2]} {root.get('height')[:-2]}"
    style = root.get("style")
    assert "--line: #" in style and "color: #" in style and "background: #" in style
    assert labels(plots.alone(plot)) == labels(plot)
