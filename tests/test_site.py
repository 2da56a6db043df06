"""The site: what hooks make of the code and of equations, and that no page needs anything from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pages
import pytest

from qaperso import config as configs

DOCS = pages.ROOT / "docs"
MATHML = "{http://www.w3.org/1998/Math/MathML}"


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


@pytest.fixture(scope="module")
def reference() -> str:
    """The page of configurations as it is built."""
    return hooks.filled((DOCS / "configs.md").read_text(encoding="utf-8"))


def test_every_key_has_one_row_with_its_default(reference: str) -> None:
    config = configs.default()
    for key in configs.keys(config):
        assert reference.count(f"| `{key}` | `{configs.get(config, key)!r}` |") == 1, key
    assert "<!--" not in reference


def test_every_key_is_explained(reference: str) -> None:
    """By a comment in config.py, or by the page's own words."""
    told = hooks.comments()
    prose = (DOCS / "configs.md").read_text(encoding="utf-8")
    for key in configs.keys(configs.default()):
        folder, _, leaf = key.rpartition(".")
        section = re.search(rf"^### {folder or 'The run'}$(.*?)^<!--", prose, re.M | re.S)
        words = section[1] if section else told.get(folder, "")
        assert key in told or re.search(rf"\b{leaf}\b", words), f"{key}: say what it is beside it in qaperso/config.py"


def test_comments_are_those_beside_the_keys() -> None:
    told = hooks.comments()
    assert told["compat"] == '"paper" = the published numerics'
    assert told["data.path"] == "of a prepared data set"
    assert told["batch"].startswith("Bounds of a row and a batch; ")
    assert told["sharding"] == "(regex on `path:axis`, mesh axis); the first match decides."
    # Their comment is that of all keys on the line.
    assert "seed" not in told and "model.embed" not in told and told["model"] == 'for base = "random"'


@pytest.mark.parametrize(
    "key, text",
    [
        ("steps", "int, above 0"),
        ("keep_best", "int, from 0 ↻"),
        ("batch.queriers", "int, from 0"),
        ("lora.dropout", "float, 0 to below 1"),
        ("qar.contrast", "`'none'`, `'in_batch'`, `'prototypes'`"),
        ("qar.querier_embedding", "bool"),
    ],
)
def test_what_is_allowed_is_what_is_checked(key: str, text: str) -> None:
    assert hooks.allowed(key) == text


def test_folders_that_no_marker_names_are_appended() -> None:
    found = hooks.filled("# A\n\n<!-- keys: qar -->\n\n## B\n")
    assert found.index("`qar.rank`") < found.index("### lora") < found.index("## B")
    assert "`lora.rank`" in found and "`seed`" in found


def test_every_file_of_configs_is_described(reference: str) -> None:
    for path in (pages.ROOT / "configs").glob("*.py"):
        assert reference.count(f"### {path.stem}\n") == 1, path
    assert "qar.split_layer = 20" in reference and "# qar_llama3_8b.py:v5e-16" in reference


def test_equations_become_mathml() -> None:
    page = '<p>a <span class="arithmatex">\\(x_i &lt; 1\\)</span> b</p><div class="arithmatex">\\[\n\\frac{1}{2}\n\\]</div>'
    found = hooks.drawn(page)
    inline, block = (ElementTree.fromstring(text) for text in re.findall(r"<math.*?</math>", found, re.S))
    assert (inline.get("display"), block.get("display")) == ("inline", "block")
    assert inline.find(f".//{MATHML}msub") is not None and "".join(inline.itertext()) == "xi<1"
    assert block.find(f".//{MATHML}mfrac") is not None
    assert found.startswith("<p>a <math") and "arithmatex" not in found


def test_links_out_of_docs() -> None:
    text = "[a](../Makefile) [b](data.md) [c](../qaperso/config.py), ![d](images/page.png)"
    assert hooks.linked(text) == {"Makefile", "qaperso/config.py"}
    assert "install" in hooks.shown("Makefile") and hooks.shown("qaperso/types.py").startswith(
        "# qaperso/types.py\n\n~~~"
    )
    with pytest.raises(FileNotFoundError):
        hooks.shown("gone.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link or anchor ends the build."""
    config = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(config.load_config(str(pages.ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_no_page_needs_anything_from_elsewhere(site: Path) -> None:
    built = list(site.rglob("*.html"))
    assert {page.stem for page in DOCS.glob("*.md")} < {page.stem for page in built}
    for page in built:
        # Prose may hold what looks like markup in code, which is escaped.
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//[^"]*"', text), page
        assert not re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(?:https?:)?//[^"]*"', text), (
            page
        )
        assert "@import" not in text


def test_every_equation_is_drawn(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        built = (site / f"{page.stem}.html").read_text(encoding="utf-8")
        source = re.sub(r"```.*?```|`[^`\n]*`|^    .*$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        displayed = len(re.findall(r"^\$\$$", source, re.M)) // 2
        assert len(re.findall(r'<math[^>]*display="block"', built)) == displayed, page
        assert "arithmatex" not in built and "$$" not in re.sub(r"<code.*?</code>", "", built, flags=re.S), page
    assert (site / "methods.html").read_text(encoding="utf-8").count("<math") > 20


@pytest.mark.slow
def test_a_browser_reads_it_from_files(site: Path) -> None:
    """On a phone nothing but tables, code and equations scrolls sideways; search works; nothing is asked of anybody."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    with playwright.sync_playwright() as started:
        path = next(filter(None, map(shutil.which, names)), started.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip(f"no browser: none of {', '.join(names)} is on PATH, nor is playwright's own installed")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for file in sorted(site.glob("*.html")):
            page.goto(file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == 390, file.name
        page.goto((site / "methods.html").as_uri())
        heights = page.eval_on_selector_all("math", "all => all.map(e => e.getBoundingClientRect().height)")
        assert len(heights) > 20 and min(heights) > 5
        page.set_viewport_size({"width": 1300, "height": 800})
        page.click(".md-search__input")
        page.keyboard.type("swap gap")
        playwright.expect(page.locator(".md-search-result__meta")).to_contain_text("matching documents", timeout=60_000)
        playwright.expect(page.locator(".md-search-result__list")).to_contain_text("What is a swap gap?")
        assert asked and all(url.startswith("file:") for url in asked)
        browser.close()
