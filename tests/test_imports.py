"""Imports point to earlier stages only; no file is longer than 400 lines."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qaperso"

# Each stage may import from itself (above it in this list) and from earlier ones.
ORDER = """errors storage types arrays config engine endpoint chips hlo_text hlo notes differences data.contrast data.town
data.synthetic data.formats.common data.formats data.formats.jsonl data.formats.mqdialog data.formats.scenes
data.formats.script data.formats.table data.formats.whatsapp data.formats.telegram data.formats.slack
data.formats.discord data.formats.chitchat data.formats.lamp data.formats.longlamp data.formats.reviews data.clean
data.runs data.duplicates data.splits data.features data.clusters data.prepared data.shards data.merge data.topics
data.store data.history data.peers data.vectors data.text data.plan data.batches data.paper data.reviews_town
data.load models.config models.shapes models.base models.linear models.lora models.quantized models.spread models.flash
models.splash models.attention models.decoder models.gguf models.hf models.published models.tokenizer models.towers models.inference models.encoder
models.embedder models.plug losses generate methods methods.base methods.sft methods.pplug methods.qar
methods.sft_rows methods.prompts methods.dpl mesh step checkpoint metrics people portable run claim stopping batching
reply rows writers roofline aot eval.intervals eval.overlap eval.lamp eval.compare eval.scores eval.awareness
eval.retrieval eval.identify eval.paired eval.canaries eval.leakage eval.residue eval.unseen eval.report eval.card
eval.predictions eval.judge eval.plots eval.page eval.gather eval.measure server.protocol server.text server.keys
server.meters server.roster server.engine server.service server.openapi server.page server.api annotate prepare train
replay evaluate judge bench chat plan serve enrol erase forget export launch""".split()


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, as `data.text`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qaperso":
            inside = node.module.removeprefix("qaperso").lstrip(".")
            for alias in node.names:
                full = f"{inside}.{alias.name}".lstrip(".")
                found.add(full if full in ORDER else inside)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("qaperso.") for a in node.names if a.name.startswith("qaperso")}
    return found


def modules() -> dict[str, Path]:
    """{module: file}; the empty packages `data`, `models` and `eval` are left out."""
    files = {p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    names = {name.removesuffix(".__init__"): p for p, name in files.items()}
    return {name: p for name, p in names.items() if p.stat().st_size and name != "__init__"}


def test_every_module_has_its_place() -> None:
    assert sorted(modules()) == sorted(ORDER)


def test_imports_point_to_earlier_stages() -> None:
    for name, path in modules().items():
        for other in imported(path):
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}, which comes later"


def test_no_file_is_long() -> None:
    root = PACKAGE.parent
    for path in [*PACKAGE.rglob("*.py"), *(root / "tests").rglob("*.py"), *(root / "configs").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} is longer than 400 lines"
