"""Whose folder a run works in."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest
from tiny import contents
from untrained import opened

from qaperso import claim, storage
from qaperso.errors import UserError
from qaperso.run import RECORD


@pytest.fixture
def run(tmp_path):
    """A run whose folder is still to be made."""
    return dataclasses.replace(opened()[0], workdir=tmp_path / "deep" / "run")


def test_a_new_folder_gets_record_and_tokenizer_and_a_lock(run):
    with claim.claimed(run):
        names = {path.name for path in run.workdir.iterdir()}
        assert names == {RECORD, claim.TOKENIZER, storage.LOCK}
        with pytest.raises(UserError, match="a run that is under way"), claim.claimed(run):
            pass
    before = contents(run.workdir)
    with claim.claimed(run):
        pass
    assert contents(run.workdir) == before
    assert json.loads((run.workdir / RECORD).read_text())["clusters"] == run.record["clusters"]


def test_a_start_that_was_killed_halfway_is_made_good(run):
    (run.workdir / claim.TOKENIZER).mkdir(parents=True)
    (run.workdir / storage.LOCK).write_text("process 1 on a machine that is gone")
    (run.workdir / f"{RECORD}.partial").write_text('{"config"')
    with claim.claimed(run):
        assert (run.workdir / RECORD).is_file()


@pytest.mark.parametrize("names", [["thesis.txt"], [claim.TOKENIZER], [storage.LOCK, "thesis.txt"]])
def test_other_folders_are_left_alone(run, names):
    run.workdir.mkdir(parents=True)
    for name in names:
        (run.workdir / name).write_text("years of work")
    before = contents(run.workdir)
    with pytest.raises(UserError, match="exists and is not a run's folder"), claim.claimed(run):
        pass
    assert contents(run.workdir) == before


def test_other_processes_of_the_run_hold_no_lock(run, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with claim.claimed(run), claim.claimed(run):
        assert not run.workdir.exists()


def test_what_the_disk_refuses_inside_is_one_line(run):
    with pytest.raises(UserError, match="the disk is full"), claim.claimed(run):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
    with pytest.raises(ValueError, match="^shapes differ$"), claim.claimed(run):
        raise ValueError("shapes differ")
