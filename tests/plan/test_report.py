"""A plan told to people: everything that matters is on it, whatever it came to; the page opens offline and is safe."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import msgspec
import pytest

from shoal.plan.html_report import page
from shoal.plan.planner import Plan
from shoal.plan.report import REJECTIONS, plain, sections, summary
from tests.plan.goals import CHAT, plan

FOUND = {
    "answer": lambda: plan("llama-3.1-70b", "8xH100", 2.0),
    "nothing": lambda: plan("llama-3.1-405b", "8xH100", 1),
    "survives": lambda: plan("llama-3.1-8b", "2x8xH100:ndr", 1, survive="gpu"),
    "apart": lambda: plan("llama-3.1-8b", "8xH100", 4, 16_000, 200, (("ttft", "p99", 3.0), ("itl", "p99", 0.0135))),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_text_has_what_was_asked_the_outcome_and_why_not(name: str) -> None:
    found = FOUND[name]()
    text = plain(sections(found))
    for wanted in (found.goal, found.distribution, "Why not"):
        assert wanted in text
    if found.impossible is not None:
        assert "Nothing meets this goal" in text and found.impossible.bound in text
    else:
        assert summary(found) in text and "ITL p99" in text and "per 1M output tokens" in text
    assert "None" not in text


def test_rejections_are_cut_short_unless_all_are_asked_for() -> None:
    found = plan("llama-3.1-70b", "2x8xH100:ndr", 24.0, targets=CHAT)
    short, full = sections(found)[-1], sections(found, all_rejections=True)[-1]
    assert len(short.lines) == REJECTIONS + 1 and "--all" in short.lines[-1]
    assert len(full.lines) == len(found.rejections)


def test_what_is_left_after_a_loss_has_a_column() -> None:
    (predicted,) = [section for section in sections(FOUND["survives"]()) if section.title == "Predicted"]
    assert predicted.columns == ("", "predicted", "after the loss of a gpu", "target")
    assert all(len(row) == 4 for row in predicted.rows)


@pytest.mark.parametrize("name", FOUND)
def test_every_row_has_its_columns(name: str) -> None:
    for section in sections(FOUND[name](), all_rejections=True):
        assert all(len(row) == len(section.columns) for row in section.rows), section.title


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "path", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle"):
            assert self.open.pop() == tag


def tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(text)
    assert not parser.open
    return parser.seen


@pytest.mark.parametrize("name", FOUND)
def test_the_page_is_whole_and_asks_for_nothing(name: str) -> None:
    text = page(FOUND[name](), "1.2.3")
    seen = tags(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in seen}
    assert not [attributes for _, attributes in seen if {"src", "href", "onload"} & set(attributes)]
    assert "url(" not in text and "@import" not in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_the_page_draws_the_front_the_gpus_and_the_step() -> None:
    found = FOUND["answer"]()
    drawings = re.findall(r"<svg.*?</svg>", page(found, "1"), re.DOTALL)
    assert len(drawings) == 3
    assert drawings[0].count("<circle") == len(found.front)
    assert drawings[1].count("<circle") == len(found.alone)
    assert drawings[2].count("<title>") == len(found.parts)


def test_names_from_outside_are_escaped() -> None:
    found = FOUND["answer"]()
    asked = msgspec.structs.replace(found.asked, model="<script>alert(1)</script>", price_source='"><b>')
    text = page(msgspec.structs.replace(found, asked=asked), "1")
    assert "<script" not in text and '"><b>' not in text


def test_a_plan_is_json_and_back() -> None:
    found = FOUND["answer"]()
    assert msgspec.json.decode(msgspec.json.encode(found), type=Plan) == found
