"""The dashboard's files: what is sent, under which policy, and that they keep it."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import shoal.serve.dashboard
from shoal.serve.dashboard.assets import HEADERS, dashboard_assets

FOLDER = Path(shoal.serve.dashboard.__file__).parent
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".html", ".js", ".css", ".svg"))
ASSETS = dashboard_assets()
PAGE = ASSETS["/dashboard"].body.decode()


def test_every_file_is_served_with_its_type() -> None:
    assert {path.read_bytes() for path in FILES} == {asset.body for asset in ASSETS.values()}
    for path, asset in ASSETS.items():
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}.get(
            path.split(".")[-1], "text/html"
        )
        assert asset.content_type.split(";")[0] == kind
        assert asset.content_type.startswith("image/") or asset.content_type.endswith("charset=utf-8")


def test_what_the_page_names_is_served() -> None:
    named = {f"/{path}" for path in re.findall(r'(?:src|href)="(dashboard/[^"]+)"', PAGE)}
    named |= {
        f"/dashboard/{name}"
        for name in re.findall(r'from "\./([\w.]+)"', ASSETS["/dashboard/dashboard.js"].body.decode())
    }
    assert named | {"/dashboard"} == set(ASSETS)


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}, "no unsafe-inline, no unsafe-eval, no other origin"
    assert HEADERS["cache-control"] == "no-store"
    assert HEADERS["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_keep_the_policy_and_need_no_other_origin(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"https?:|//cdn|@import|url\(", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    assert not re.findall(r'\son\w+="|\sstyle="|<script>|<style|javascript:', text)


def test_they_are_in_the_package() -> None:
    project = Path(__file__).parents[3] / "pyproject.toml"
    patterns = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for path in FILES:
        assert any(fnmatch(path.name, pattern) for pattern in patterns["shoal.serve.dashboard"]), path.name
