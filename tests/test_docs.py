"""Commands, options, files and examples that pages name are there."""

from __future__ import annotations

import collections
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest

from qaperso import config as configs
from qaperso import launch
from qaperso.data import formats

ROOT = pages.ROOT
COMMAND = re.compile(r"(?:python|\$\(RUN\)) -m qaperso\.([a-z]\w*)([^`\n]*)")
# Where a shell would begin another command, or an explanation begins.
END = re.compile(r"\s+#\s.*|\s*(?:&&|\|\||;|\)|>|\s\|\s).*")
# What is in capitals, brackets or dots stands for something else.
PLACEHOLDER = re.compile(r"\[|\.\.\.|\b[A-Z][A-Z_]*\b(?!\.)")
FOLDERS = ("benchmarks", "configs", "docs", "launch", "qaperso", "tests")


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, the words after it) of every `python -m qaperso.COMMAND` in a page."""
    text = re.sub(r"\\\n\s*", " ", text)
    for match in COMMAND.finditer(text):
        yield match[1], END.sub("", match[2]).strip()
    for script in re.finditer(r"launch/\w+\.sh ([^`\n]*) -- (\w+)([^`\n]*)", text):
        yield script[2], script[3].strip()


def all_commands() -> list[tuple[str, str, str]]:
    return [(page.name, *found) for page in pages.PAGES for found in commands(page.read_text(encoding="utf-8"))]


def check(command: str, rest: str) -> None:
    """Holds the words of a command against its parser and the configuration; placeholders are not parsed."""
    known = pages.options(command)
    rest, _, inner = rest.partition(" -- ") if command == "launch" else (rest, "", "")
    words = shlex.split(rest.replace("[", " ").replace("]", " "))
    for word in words:
        name, _, _ = word.partition("=")
        if word.startswith("--config."):
            key = name.removeprefix("--config.")
            assert command in ("train", "plan") and (key in configs.keys(configs.default()) or key == "key"), word
        elif word.startswith("--"):
            assert name in known, f"qaperso.{command} has no {name}"
    if words and not PLACEHOLDER.search(rest):
        try:
            found, others = pages.parser(command).parse_known_args(words)
        except SystemExit as error:
            raise AssertionError(f"python -m qaperso.{command} {rest}") from error
        assert all(word.startswith("--config.") for word in others), others
        if "config" in vars(found):
            configs.load(ROOT / found.config, [word.removeprefix("--config.") for word in others])
        if "suite" in vars(found):
            assert (ROOT / found.suite).is_file(), found.suite
    if inner and "..." not in inner:
        check(*inner.split(" ", 1))


def test_there_is_much_to_check() -> None:
    found = all_commands()
    assert len(found) > 60
    assert {command for _, command, _ in found} == {p.stem for p in (ROOT / "qaperso").glob("*.py") if runs(p)}


def runs(module: Path) -> bool:
    return "argparse.ArgumentParser(" in module.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page.name for page in pages.PAGES])
def test_commands_parse(page: str) -> None:
    for name, command, rest in all_commands():
        if name == page:
            check(command, rest)


@pytest.mark.parametrize(
    "command, rest",
    [
        ("train", "--config configs/quickstart.py --workdir DIR --steps 3"),
        ("train", "--config configs/quickstart.py --workdir DIR --config.step=3"),
        ("chat", "--workdir runs/a --querier"),
        ("chat", "--workdir runs/a --querier ida --max-new-tokens many"),
        ("launch", "--processes 2 -- train --configs configs/quickstart.py --workdir DIR"),
    ],
)
def test_what_is_wrong_is_found(command: str, rest: str) -> None:
    with pytest.raises(AssertionError):
        check(command, rest)


def test_declared_options_are_those_of_the_parser(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    assert set(re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.M)) == pages.options("launch")


def test_scripts_have_the_options_that_pages_give_them() -> None:
    seen = 0
    for page in pages.PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for script, rest in re.findall(r"((?:launch/\w+\.sh|benchmarks/\w+\.py)) ([^`\n]*)", text):
            words = shlex.split(END.sub("", rest.partition(" -- ")[0]), comments=True)
            known = (ROOT / script).read_text(encoding="utf-8")
            if "import common" in known:
                known += (ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8")
            for word in words:
                # Those with "=" are sbatch's own; keys of the configuration are checked with configurations.
                if word.startswith("--") and "=" not in word:
                    assert word in known, f"{page.name}: {script} has no {word}"
                    seen += 1
    assert seen > 10


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {t for page in pages.PAGES for t in re.findall(r"(?:`|^    )make (\w+)", page.read_text("utf-8"), re.M)}
    assert "demo" in named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"


def expanded(name: str) -> Iterator[str]:
    """`a/{b,c}_d.py` as two names."""
    match = re.search(r"\{([^}]*)\}", name)
    for part in match[1].split(",") if match else [""]:
        yield name[: match.start()] + part + name[match.end() :] if match else name


def paths(text: str) -> Iterator[str]:
    """Files of the repository that a page names in code: what lies in one of its folders, or ends in .py."""
    for span in re.findall(r"`([^`\n]+)`", text) + re.findall(r"(?<=\s)configs/\S+\.py(?:\:[\w-]+)?", text):
        for word in span.split():
            for name in expanded(word.strip("().,;")):
                if re.fullmatch(rf"(?:(?:{'|'.join(FOLDERS)})/)?[\w./*-]+\.(?:py|sh|md|html|json)(?:\:[\w-]+)?", name):
                    if name.split("/")[0] in FOLDERS or name.endswith(".py"):
                        yield name


def exists(name: str) -> bool:
    """Whether a file is there, seen from the root or from some folder of the package or of the tests."""
    name, _, variant = name.partition(".py:")
    name = f"{name}.py" if variant else name
    # Names in tables stand below their folder.
    places = [ROOT, ROOT / "configs", ROOT / "tests", ROOT / "benchmarks", ROOT / "qaperso", ROOT / "qaperso" / "data"]
    places += [p for p in (ROOT / "qaperso").iterdir() if p.is_dir()]
    found = [file for place in places for file in place.glob(name)]
    return bool(found) and (not variant or variant in configs.variants(found[0]))


@pytest.mark.parametrize("page", [page.name for page in pages.PAGES])
def test_files_exist(page: str) -> None:
    path = next(p for p in pages.PAGES if p.name == page)
    # Examples that are to be written by the reader.
    own = {block.title for block in pages.blocks(path)}
    stand_ins = {"mine.py", "configs/x.py"} | {Path(title).name for title in own} | own
    for name in paths(path.read_text(encoding="utf-8")):
        stands_for_any = re.search(r"\b[A-Z]+\.py", name)
        assert stands_for_any or name in stand_ins or exists(name), f"{page} names {name}"


def test_names_are_expanded_and_missed() -> None:
    found = list(paths("`configs/{quickstart,gone}.py`, `tests/test_docs.py`, `run.json` and `configs/a.py:b`"))
    assert found == ["configs/quickstart.py", "configs/gone.py", "tests/test_docs.py", "configs/a.py:b"]
    assert (
        exists("configs/qar_llama3_8b.py:v5e-16")
        and not exists("configs/qar_llama3_8b.py:v9")
        and not exists("gone.py")
    )


def test_the_example_of_a_configuration_loads(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(pages.titled(ROOT / "docs" / "configs.md", "mine.py"), encoding="utf-8")
    assert configs.load(tmp_path / "mine.py").data.path == "data/mine"


@pytest.mark.parametrize("name", formats.FORMATS)
def test_the_examples_of_formats_are_read(name: str, tmp_path: Path) -> None:
    for block in pages.blocks(ROOT / "docs" / "data.md"):
        if block.section == name and block.title:
            file = tmp_path / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    inside = list(tmp_path.iterdir())
    root = inside[0] if len(inside) == 1 and inside[0].is_dir() else tmp_path
    assert formats.detect(root)[0] == name
    module, counts = formats.load(name), collections.Counter()
    records = [record for unit in module.units(root) for record in module.read(unit, counts)]
    texts = [piece.text for record in records for piece in getattr(record, "messages", None) or record.turns]
    assert len(texts) >= 2 and all(texts)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_whatever_a_reader_counts_is_told(name: str) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {name}$(.*?)^##", text, re.M | re.S)[1]
    source = (ROOT / "qaperso" / "data" / "formats" / f"{name}.py").read_text(encoding="utf-8")
    for what in re.findall(r'counts\["([^"]+)"\]', source) + re.findall(r'kind(?:, text)? = "([^"]+)"', source):
        assert f"`{what}`" in section, f"{name}: {what}"


def test_every_option_of_prepare_is_told() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for option in pages.options("prepare") - {"--help"}:
        assert f"`{option}`" in text, option
