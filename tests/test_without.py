"""Queriers who are left out of the data, by name or by what stands for their name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaperso import config as configs
from qaperso.data import load
from qaperso.errors import UserError


@given(st.text(), st.text())
def test_a_token_is_of_one_name(name: str, other: str) -> None:
    token = load.token(name)
    assert load.is_named(name, [token]) and load.is_named(name, ["x", name])
    assert load.is_named(other, [token]) == (other == name)
    assert token != load.token(name) and token == load.token(name, token.split(":")[1])


def test_what_only_looks_like_a_token_is_nobody_s() -> None:
    assert not any(load.is_named("ann", [text]) for text in ("sha256:", "sha256:ab", "sha256:ab:cd:ef", "SHA256:a:b"))


@pytest.mark.slow
def test_dialogues_of_who_is_left_out_are_gone_and_others_stay() -> None:
    data = configs.default().data
    whole = load.load_dialogues(data)
    for names in (
        ("pip", "voss"),
        (load.token("pip"), "voss"),
        (load.token("pip"), load.token("voss"), load.token("x")),
    ):
        data.without = names
        assert load.load_dialogues(data) == [d for d in whole if d.querier not in ("pip", "voss")]
    data.clusters = 2
    assert load.load_store(data).registry.queriers == tuple(sorted({d.querier for d in whole} - {"pip", "voss"}))


def test_names_that_cannot_be_left_out(tmp_path) -> None:
    data = configs.default().data
    data.without = ("pipp",)
    with pytest.raises(UserError, match=r"config\.data\.without names 'pipp'.*did you mean 'pip'\?"):
        load.load_dialogues(data)
    (tmp_path / "c.py").write_text("from qaperso.config import default as get_config\n", encoding="utf-8")
    assert configs.load(tmp_path / "c.py", ["data.without=('pip',)"]).data.without == ("pip",)
    for wrong in ("(3,)", "('',)"):
        with pytest.raises(UserError, match=r"config\.data\.without holds"):
            configs.load(tmp_path / "c.py", [f"data.without={wrong}"])
