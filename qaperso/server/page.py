"""The page at `/`: one file without assets of its own, under a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path


def load_page() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that allows its own script and style and no others."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    allowed = {f"{tag}-src": _digest(html, tag) for tag in ("script", "style")}
    rules = {"default-src": "'none'", **allowed, "connect-src": "'self'", "img-src": "data:"}
    rules |= {"base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}
    return html, "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(html: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
