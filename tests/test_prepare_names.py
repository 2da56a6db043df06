"""Names in what `prepare` reads: of files, of people under other names, and of those who are to be hidden."""

from __future__ import annotations

import os
import unicodedata

import tiny
from test_prepare import call, refused, scenes, stats_of, talk, write

from qaperso.data import prepared


def test_files_of_another_format(tmp_path):
    """They are named and counted; a folder of one format is told nothing of them."""
    folder = tmp_path / "in"
    write(folder / "scenes.jsonl", scenes())
    write(folder / ".hidden" / "notes.txt", ["notes"])
    write(folder / ".notes.txt", ["notes"])
    code, out, err = call(folder, tmp_path / "alone")
    assert code == 0 and "not read" not in out + err + (tmp_path / "alone" / "stats.json").read_text()
    for name in ("b/chat.txt", "a.txt"):
        write(folder / name, ["1/2/24, 10:00 - Ann: Are you open?"])
    code, out, err = call(folder, tmp_path / "mixed")
    assert code == 0, err
    assert (
        "files not read as scenes: 2, first a.txt; prepare other formats apart\n" in err
        and "files not read: 2\n" in out
    )
    mixed, alone = stats_of(tmp_path / "mixed"), stats_of(tmp_path / "alone")
    assert mixed["counts"].pop("files not read") == 2
    assert mixed["dropped"].pop("files not read") == ["a.txt", "b/chat.txt"]
    assert mixed == alone and prepared.read(tmp_path / "mixed") == prepared.read(tmp_path / "alone")
    # Their names may be those of people.
    (tmp_path / "secret").write_text("a secret that nobody guesses")
    assert call(folder, tmp_path / "hidden", "--pseudonyms", str(tmp_path / "secret"))[0] == 0
    assert stats_of(tmp_path / "hidden")["counts"]["files not read"] == 2
    assert "a.txt" not in (tmp_path / "hidden" / "stats.json").read_text()


def test_names_of_files_that_are_no_text(tmp_path):
    """As archives from elsewhere unpack; the names of what is read and of what is not."""
    folder = tmp_path / "in"
    write(folder / os.fsdecode(b"caf\xe9") / "a.jsonl", scenes(30))
    write(folder / "b.jsonl", scenes(30, seed=1))
    write(folder / os.fsdecode(b"caf\xe9.txt"), ["notes"])
    code, _, err = call(folder, tmp_path / "out")
    assert code == 0, err
    assert {d.id.rpartition("/scene ")[0] for d in prepared.read(tmp_path / "out")} == {"caf?/a/a", "b/b"}
    assert stats_of(tmp_path / "out")["dropped"] == {"files not read": ["caf?.txt"]}
    write(folder / os.fsdecode(b"caf\xe8.txt"), ["notes"])
    assert "from other input" in refused(folder, tmp_path / "out")


# What the options do.


def test_aliases_scrubbing_and_pseudonyms(tmp_path):
    items = scenes()
    items[0]["turns"][0] |= {
        "speaker": "annie",
        "text": "rex, write to me@example.org about the harbour and the meadow",
    }
    source = write(tmp_path / "in.jsonl", items)
    (tmp_path / "aliases.json").write_text('{"ann": ["annie"]}')
    (tmp_path / "secret").write_text("a secret that nobody guesses")
    how = ("--aliases", str(tmp_path / "aliases.json"), "--scrub", "--pseudonyms", str(tmp_path / "secret"))
    code, out, err = call(source, tmp_path / "out", *how)
    assert code == 0, err
    dialogues = prepared.read(tmp_path / "out")
    text = "".join(
        p.read_bytes().decode("latin-1") for p in (tmp_path / "out").iterdir() if "array_record" not in p.name
    )
    text += repr(dialogues)
    assert len({d.querier for d in dialogues}) == 3 and {d.responder for d in dialogues}.isdisjoint({"rex"})
    for word in ("annie", "rex,", "'ann'", "'rex'", "example.org", "a secret"):
        assert word not in text.replace('"', "'"), word
    asked = next(d for d in dialogues if "[email]" in d.turns[0].text)
    assert asked.turns[0].text.startswith(asked.responder + ", write to [email]")
    assert stats_of(tmp_path / "out")["counts"]["email"] == 1


def test_aliases_that_nobody_goes_by_are_told(tmp_path):
    source = write(tmp_path / "in.jsonl", scenes())
    (tmp_path / "aliases.json").write_text('{"ann": ["an", "bn"], "cleo": ["rexx"]}')
    how = ("--aliases", str(tmp_path / "aliases.json"))
    code, _, err = call(source, tmp_path / "out", *how)
    assert code == 0 and "aliases that nobody goes by: 3, first 'an'; did you mean 'ann'?" in err
    (tmp_path / "aliases.json").write_text('{"cleo": ["ann"]}')
    code, _, err = call(source, tmp_path / "renamed", *how)
    assert code == 0 and "nobody goes by" not in err


def test_pseudonyms_of_those_who_never_speak_to_whom_is_asked_for(tmp_path):
    items = [*scenes(), {"group": "apart", "turns": talk(900, "zebulon", "ann")}]
    items[0]["turns"][0]["text"] = "Zebulon told me that the harbour is closed"
    (tmp_path / "secret").write_text("a secret that nobody guesses")
    how = ("--pseudonyms", str(tmp_path / "secret"))
    code, _, err = call(write(tmp_path / "in.jsonl", items), tmp_path / "out", *how)
    assert code == 0, err
    (told,) = (t.text for d in prepared.read(tmp_path / "out") for t in d.turns if "told me that" in t.text)
    assert not told.startswith("Zebulon") and told.endswith(" told me that the harbour is closed")


def test_responder_in_another_form_of_unicode(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"group": f"g{i}", "turns": talk(i, "ann", "René")} for i in range(20)])
    how = ("--responder", unicodedata.normalize("NFD", "René") + " ")
    code, _, err = call(source, tmp_path / "out", *how)
    assert code == 0, err
    assert {d.responder for d in prepared.read(tmp_path / "out")} == {"René"}


def test_pseudonyms_hide_the_names_of_files(tmp_path):
    write(tmp_path / "in" / "zebulon.jsonl", scenes())
    (tmp_path / "secret").write_text("a secret that nobody guesses")
    assert call(tmp_path / "in", tmp_path / "plain")[0] == 0
    assert stats_of(tmp_path / "plain")["format"]["why"].startswith("zebulon.jsonl: JSON lines")
    code, _, err = call(tmp_path / "in", tmp_path / "out", "--pseudonyms", str(tmp_path / "secret"))
    assert code == 0, err
    assert stats_of(tmp_path / "out")["format"] == {"name": "scenes", "why": "run without pseudonyms to see"}
    assert not any(b"zebulon" in (content or b"") for content in tiny.contents(tmp_path / "out").values())
