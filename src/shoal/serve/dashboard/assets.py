"""The files of the dashboard as the HTTP front sends them: bytes, content type, headers. They hold nothing secret."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
)
HEADERS: Mapping[str, str] = {
    "cache-control": "no-store",
    "content-security-policy": "; ".join(_POLICY),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""For every file: nothing from elsewhere runs or is asked, no page may frame it, and a new version is seen at once."""

_FILES = {
    "/dashboard": ("index.html", "text/html; charset=utf-8"),
    "/dashboard/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/dashboard/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/dashboard/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard/icon.svg": ("icon.svg", "image/svg+xml"),
}


class Asset(msgspec.Struct, frozen=True):
    body: bytes
    content_type: str


def dashboard_assets() -> dict[str, Asset]:
    """By path, to be served to anyone who may connect: the page itself asks for a key where `/fleet` needs one."""
    folder = Path(__file__).parent
    return {path: Asset((folder / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}
