"""What `mkdocs build` (`make docs`) adds to the pages: tables made from the code, equations, and links out of docs/.

- `<!-- keys: NAME -->` in configs.md becomes the table of a folder's keys, `<!-- files -->` the list of configs/. Folders
  that no marker names are appended, so no key can be missing.
- Equations stand between dollars, as GitHub shows them too, and become MathML: browsers draw it without scripts or fonts.
- A link to a file outside docs/, such as `../Makefile`, leads in the repository to the file, and on the site to a page that
  shows it.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qaperso import config as configs
from qaperso.data.formats.common import read_text

ROOT = Path(__file__).resolve().parents[1]
# Of a page of the site that shows a file of the repository.
SHOWN = "source"
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml", ".json": "json"}

_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)\)")
_KEYS = re.compile(r"^<!-- keys: (\w*) -->$", re.M)
_FILES = re.compile(r"^<!-- files -->$", re.M)
_NAME = re.compile(r"<code>(?=[^<\s]{1,32}</code>)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for every file of the repository that some page links to."""
    from mkdocs.structure.files import File

    named = {name for file in files.documentation_pages() for name in linked(file.content_string)}
    for name in sorted(named):
        files.append(File.generated(config, f"{SHOWN}/{name}.md", content=shown(name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in what is made from the code, and leads links out of docs/ to the pages that show their files."""
    if page.file.src_uri == "configs.md":
        markdown = filled(markdown)
    if not page.file.src_uri.startswith(f"{SHOWN}/"):
        markdown = _OUTSIDE.sub(rf"]({SHOWN}/\1.md)", markdown)
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Draws equations, and keeps names on one line: an option would break after its hyphens."""
    return _NAME.sub('<code class="name">', drawn(html))


def linked(markdown: str) -> set[str]:
    """The files outside docs/ that a page links to, from the root of the repository."""
    return set(_OUTSIDE.findall(markdown))


def shown(name: str) -> str:
    """The page that shows a file.

    Raises:
      FileNotFoundError: there is no such file.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    return f"# {name}\n\n~~~~~~{{.{LANGUAGES.get(Path(name).suffix, 'text')}}}\n{text}~~~~~~\n"


def drawn(page: str) -> str:
    """HTML with the equations that arithmatex has marked as MathML."""
    from latex2mathml.converter import convert

    def draw(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline")

    return _MATH.sub(draw, page)


def filled(markdown: str) -> str:
    """The reference of configurations with its tables."""
    tables = {name: table(name) for name in folders()}
    named = set(_KEYS.findall(markdown))
    said = comments()
    rest = "".join(f"\n\n### {n}\n\n{said.get(n, '')}\n\n{text}" for n, text in tables.items() if n not in named)
    last = list(_KEYS.finditer(markdown))[-1]
    markdown = markdown[: last.end()] + rest + markdown[last.end() :]
    markdown = _KEYS.sub(lambda found: tables[found[1]], markdown)
    return _FILES.sub(lambda _: files_of_configs(), markdown)


def folders() -> list[str]:
    """The folders of the configuration tree in their order; "" = the keys that are in none."""
    config = configs.default()
    return ["", *(name for name in order() if isinstance(config[name], ConfigDict))]


def order() -> list[str]:
    """Names of the top of the tree, as `config.default` sets them."""
    return [name for name, _ in _statements()]


def table(folder: str) -> str:
    """The keys of a folder: default, what is allowed, and the comment beside the key in qaperso/config.py."""
    config, told = configs.default(), comments()
    names = list(dict(config[folder])) if folder else [n for n in order() if not isinstance(config[n], ConfigDict)]
    lines = ["| key | default | allowed | |", "|---|---|---|---|"]
    for name in names:
        key = f"{folder}.{name}" if folder else name
        # Within code a pipe ends no cell.
        said = told.get(key, "").replace("|", "\\|")
        lines.append(f"| `{key}` | `{configs.get(config, key)!r}` | {allowed(key)} | {said} |")
    return "\n".join(lines)


def allowed(key: str) -> str:
    """The type of a key and its bounds or choices, as `config.load` checks them; ↻ = may change when a run goes on."""
    value = configs.get(configs.default(), key)
    text = type(value).__name__
    if key in configs.CHOICES:
        text = ", ".join(f"`{choice!r}`" for choice in configs.CHOICES[key])
    elif key in configs.SHARES:
        text += ", 0 to below 1"
    elif key in configs.NOT_NEGATIVE:
        text += ", from 0"
    elif key in configs.POSITIVE or key.split(".")[0] in configs.POSITIVE:
        text += ", above 0"
    return text + (" ↻" if key.split(".")[0] in configs.OPERATIONAL else "")


def comments() -> dict[str, str]:
    """{key: the comment at its line's end, else the comment lines above it}; a folder's is of the lines above it."""
    lines = read_text(ROOT / "qaperso" / "config.py").split("\n")
    found = {}
    for name, node in _statements():
        found[name] = _beside(lines, node.end_lineno, node.lineno)
        for keyword in (k for call in ast.walk(node.value) if isinstance(call, ast.Call) for k in call.keywords):
            # Several keys on one line share what stands there, which is then no key's own.
            if lines[keyword.lineno - 1].strip().startswith(f"{keyword.arg}="):
                found[f"{name}.{keyword.arg}"] = _beside(lines, keyword.value.end_lineno, keyword.lineno)
    return {key: text for key, text in found.items() if text}


def _beside(lines: list[str], last: int, first: int) -> str:
    """The comment after line number `last`, else those above line number `first`."""
    own = re.search(r"(?:^|\s)# (.*)$", lines[last - 1])
    if own:
        return own[1]
    above: list[str] = []
    while lines[first - 2 - len(above)].strip().startswith("# "):
        above.insert(0, lines[first - 2 - len(above)].strip()[2:])
    return " ".join(above)


def _statements() -> list[tuple[str, ast.Assign]]:
    """(name, assignment) of every `c.NAME = ...` in `config.default`."""
    tree = ast.parse(read_text(ROOT / "qaperso" / "config.py"))
    body = next(n.body for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "default")
    assigned = (n for n in body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Attribute))
    return [(node.targets[0].attr, node) for node in assigned]


def files_of_configs() -> str:
    """What each file of configs/ says of itself, and what it sets; suites come last."""
    paths = sorted((ROOT / "configs").glob("*.py"), key=lambda path: (path.name.startswith("suite_"), path.name))
    return "\n\n".join(map(described, paths))


def described(path: Path) -> str:
    """A file of configs/: its docstring, its variants, and the keys that it sets."""
    source = read_text(path)
    if path.name.startswith("suite_"):
        what, lines = "The suite", source.strip().split("\n")
    else:
        default, config = configs.default(), configs.load(path)
        changed = [key for key in configs.keys(default) if configs.get(config, key) != configs.get(default, key)]
        what, lines = "What it sets", [f"{key} = {configs.get(config, key)!r}" for key in changed]
        for name, changes in configs.variants(path).items():
            lines += ["", f"# {path.name}:{name}", *(f"{key} = {value!r}" for key, value in changes.items())]
    block = [f'??? quote "{what}"', "", "    ~~~~{.python}", *(f"    {line}".rstrip() for line in lines), "    ~~~~"]
    return "\n".join([f"### {path.stem}", "", ast.get_docstring(ast.parse(source)), "", *block])
