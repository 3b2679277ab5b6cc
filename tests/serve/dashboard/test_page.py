"""The dashboard in a browser: what it shows of a status, how it follows one, and what it does when there is none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.dashboard.browser import Browser, FakeGateway
from tests.serve.fleet_statuses import (
    REASONS,
    STATES,
    empty,
    endpoint,
    every_state,
    fleet,
    model,
    nothing_known,
    short_and_degraded,
)

ROWS = """[...document.querySelectorAll('tbody tr')].map((row) => ({
    name: row.querySelector('[data-field=name]').innerText, state: row.querySelector('.state').innerText.trim(),
    shape: row.querySelector('use').getAttribute('href'), text: row.innerText}))"""


def show(browser: Browser, gateway: FakeGateway) -> None:
    browser.open(f"{gateway.url}/dashboard")
    browser.until(lambda: browser.read("!document.getElementById('main').hidden"), "the fleet is shown")


def rows(browser: Browser) -> dict[str, Any]:
    return {row["name"]: row for row in browser.read(ROWS)}


def test_every_state_has_a_word_a_shape_and_a_reason(browser: Browser, gateway: FakeGateway) -> None:
    show(browser, gateway)
    shown = rows(browser)
    assert list(shown) == [f"small-{i}" for i in range(len(STATES) + 1)] + ["big-0", "big-1"]
    for i, state in enumerate(STATES, 1):
        row = shown[f"small-{i}"]
        assert (row["state"], row["shape"]) == (state, f"#state-{state}")
        assert REASONS.get(state, "") in row["text"]
        assert browser.read(f"document.querySelector('symbol#state-{state}') !== null")
    assert browser.errors() == []


def test_what_an_endpoint_does(browser: Browser, gateway: FakeGateway) -> None:
    show(browser, gateway)
    shown = rows(browser)
    text = shown["small-0"]["text"]
    for part in ("pid 4711", "tp2", "bfloat16", "8,123 tokens", "6 running", "1 waiting", "43%", "21 ms a token"):
        assert part in text
    assert "prefill 5,230 tokens/s" in text and "20 ms ago" in text
    assert "breaker open" in shown["small-6"]["text"] and "breaker" not in text
    assert "spare" in shown["big-1"]["text"] and "spare" not in shown["big-0"]["text"]
    bar = "document.querySelectorAll('tbody tr')[0].querySelector('.bar')"
    assert browser.read(f"{bar}.getAttribute('aria-valuenow')") == "43"
    assert browser.read(f"{bar}.firstElementChild.offsetWidth / {bar}.offsetWidth") == pytest.approx(0.43, abs=0.02)


def test_what_a_model_and_the_fleet_do(browser: Browser, gateway: FakeGateway) -> None:
    show(browser, gateway)
    panel, overview = browser.text(".model"), browser.text(".overview")
    for part in ("predicted", "N+1 ok", "84 ms", "p90 210 ms", "p99 640 ms", "1.90 s", "2 queued, 911 tokens"):
        assert part in panel
    for name, value in (("Migrations", "18"), ("Retries", "4"), ("Hedges", "1"), ("Refused", "12"), ("Failed", "0")):
        assert f"{name}\n{value}" in panel
    assert "4 of 9" in overview and "1 starting, 1 suspect, 1 fenced, 1 draining, 1 down" in overview
    assert "survived" in overview
    assert browser.read("document.title") == "4/9 ready · shoal fleet"
    events = browser.text("#events")
    assert events.index("7 requests went on at small-0") < events.index("small-1 was added"), "newest first"


def test_what_is_not_known_is_not_zero(browser: Browser, gateway: FakeGateway) -> None:
    gateway.status = nothing_known()
    show(browser, gateway)
    assert "N+1 unknown" in browser.text(".model")
    assert "nothing in the last 5 min" in browser.text(".model")
    assert "%" not in rows(browser)["new-0"]["text"]
    assert "Nothing has happened yet" in browser.text()


def test_an_empty_fleet_says_what_to_do(browser: Browser, gateway: FakeGateway) -> None:
    gateway.status = empty()
    show(browser, gateway)
    assert "No model is configured. Add endpoints with shoal fleet add" in browser.text()
    gateway.status = fleet([model("lonely", [])])
    browser.until(lambda: "This model has no endpoint" in browser.text(".model"), "a model without endpoints")
    assert "No model is configured" not in browser.text()


def test_a_fleet_in_trouble(browser: Browser, gateway: FakeGateway) -> None:
    gateway.status = short_and_degraded()
    show(browser, gateway)
    banners = browser.until(lambda: browser.text("#banners"), "banners")
    assert "This gateway is draining" in banners
    assert "Audit log: the log was cut off after entry 1201" in banners
    assert "Requests for llama-70b are served by smollm2-135m" in banners
    assert "N+1 short by 140 tokens/s" in browser.text(".model")
    assert "short" in browser.text(".overview")
    gateway.status = every_state()
    browser.until(lambda: not browser.text("#banners"), "the banners are gone")
    assert "served by" not in browser.text(".model")


def test_it_follows_the_fleet_and_keeps_rows_that_stay(browser: Browser, gateway: FakeGateway) -> None:
    gateway.status = fleet([model("m", [endpoint("a"), endpoint("b"), endpoint("c")])])
    show(browser, gateway)
    browser.read("document.querySelectorAll('tbody tr').forEach((row, i) => { row.mark = i })")
    gateway.status = fleet([model("m", [endpoint("b", "draining"), endpoint("d", "starting"), endpoint("c")])])
    browser.until(lambda: list(rows(browser)) == ["b", "d", "c"], "the new endpoints")
    assert browser.read("[...document.querySelectorAll('tbody tr')].map((row) => row.mark ?? null)") == [1, None, 2]
    assert [row["state"] for row in browser.read(ROWS)] == ["draining", "starting", "ready"]
    paths = "[...document.querySelectorAll('.chart .line')].filter((p) => p.getAttribute('d').includes('L')).length"
    browser.until(lambda: browser.read(paths) >= 5, "lines of what was before")
    labels = browser.read("[...document.querySelectorAll('.chart svg')].map((svg) => svg.getAttribute('aria-label'))")
    assert labels[0] == "Time to first token over the last five minutes, now 84 ms"


def test_names_are_text_whatever_is_in_them(browser: Browser, gateway: FakeGateway) -> None:
    evil = "<img src=x onerror=document.title='owned'>"
    gateway.status = fleet([model(evil, [endpoint(evil, "down", reason=evil, address=evil)], policy=evil)])
    show(browser, gateway)
    assert evil in browser.text(".model h2") and evil in rows(browser)
    assert browser.read("document.querySelectorAll('main img').length") == 0
    assert browser.errors() == []


# --- without a status -------------------------------------------------------------------------------------------------


def test_a_gateway_that_is_gone_and_returns(browser: Browser, gateway: FakeGateway) -> None:
    show(browser, gateway)
    browser.until(lambda: browser.text("#connection") == "live", "it is live")
    assert not browser.text("#banners"), "the control: nothing is wrong yet"
    gateway.stop()
    banner = browser.until(lambda: browser.text("#banners"), "a banner")
    assert "The gateway does not answer: no connection. What is shown is of " in banner
    assert browser.text("#connection") == "no answer"
    assert browser.read("document.body.classList.contains('stale')")
    assert "small-0" in rows(browser), "what was last known stays readable"
    gateway.status = fleet([model("m", [endpoint("fresh")])])
    gateway.start()
    browser.until(lambda: "fresh" in rows(browser), "the new status")
    browser.until(lambda: not browser.text("#banners"), "the banner is gone")
    assert not browser.read("document.body.classList.contains('stale')")


@pytest.mark.parametrize(
    ("answer", "message"),
    [((500, b"{}"), "it answered with status 500"), ((200, b"<html>"), "its answer is cut off or no JSON")],
)
def test_an_answer_that_is_none(browser: Browser, gateway: FakeGateway, answer: Any, message: str) -> None:
    show(browser, gateway)
    gateway.answer = answer
    browser.until(lambda: message in browser.text("#banners"), message)
    gateway.answer = None
    browser.until(lambda: not browser.text("#banners"), "the banner is gone")


def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Browser, gateway: FakeGateway) -> None:
    gateway.api_key = "secret-key"
    browser.open(f"{gateway.url}/dashboard")
    browser.until(lambda: browser.text("#key-form"), "the form")
    assert browser.read("document.getElementById('main').hidden")
    assert browser.read("document.activeElement.id") == "key"
    browser.type("#key", "wrong-key")
    browser.click("#key-form button")
    browser.until(lambda: "This key was not accepted" in browser.text("#key-form"), "the refusal")
    assert [key for _, key in gateway.asked].count("Bearer wrong-key") == 1
    browser.type("#key", " secret-key ")
    browser.click("#key-form button")
    browser.until(lambda: "small-0" in rows(browser), "the fleet")
    assert browser.text("#key-form") == ""
    assert [key for _, key in gateway.asked].count("Bearer wrong-key") == 1, "a wrong key is not tried again"
    assert browser.read("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    browser.call("refresh")
    browser.until(lambda: "small-0" in rows(browser), "the fleet, without asking again")
    browser.click("#forget-key")
    browser.until(lambda: browser.text("#key-form"), "the form, after forgetting")
    assert browser.read("sessionStorage.length") == 0


def test_a_key_that_is_revoked_leaves_nothing_on_the_page(browser: Browser, gateway: FakeGateway) -> None:
    show(browser, gateway)
    gateway.api_key = "rotated"
    browser.until(lambda: browser.text("#key-form"), "the form")
    page = browser.read("document.body.textContent")
    assert "asks for an API key" in page, "the control"
    assert "small-0" not in page and "smollm2-135m" not in page


# --- the page itself --------------------------------------------------------------------------------------------------


def test_it_talks_to_its_own_origin_alone(browser: Browser, gateway: FakeGateway) -> None:
    elsewhere = FakeGateway()
    elsewhere.start()
    show(browser, gateway)
    own = {"/dashboard", "/dashboard/dashboard.js", "/dashboard/charts.js", "/dashboard/dashboard.css"}
    assert own < {path for path, _ in gateway.asked} <= own | {"/dashboard/icon.svg", "/fleet"}
    assert browser.errors() == []
    ask = "fetch({}, {{mode: 'no-cors'}}).then(() => 'answered', () => 'refused')"
    assert browser.read(ask.format("'fleet'")) == "answered"
    assert browser.read(ask.format(f"'{elsewhere.url}/fleet'")) == "refused"
    assert elsewhere.asked == []
    assert "Content Security Policy" in "".join(browser.errors())
    elsewhere.stop()


@pytest.mark.parametrize("width", [340, 620, 900, 1440])
def test_no_width_needs_scrolling_sideways(browser: Browser, gateway: FakeGateway, width: int) -> None:
    browser.emulate(width=width)
    show(browser, gateway)
    assert browser.read("innerWidth") == width
    assert browser.read("document.documentElement.scrollWidth") <= width
    assert "8,123 tokens" in rows(browser)["small-0"]["text"]


def test_a_table_that_is_too_wide_can_be_scrolled(browser: Browser, gateway: FakeGateway) -> None:
    gateway.status = fleet([model("m", [endpoint("a-name-that-is-longer-than-names-ought-to-be" * 3)])])
    browser.emulate(width=920)
    show(browser, gateway)
    assert browser.read("document.querySelector('table').offsetWidth") > 920, "the control: it is too wide"
    browser.read("document.querySelector('.scroll').scrollBy(5000, 0)")
    last = "document.querySelector('tbody td:last-child').getBoundingClientRect().right"
    browser.until(lambda: browser.read(last) <= 920, "the last column can be reached")


CONTRAST = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.body.querySelectorAll('*')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest('svg')) continue;
    const [a, b] = [light(channels(getComputedStyle(node).color)), light(behind(node))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.trim().slice(0, 40)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, gateway: FakeGateway, scheme: str) -> None:
    """WCAG AA: 4.5 to 1."""
    browser.emulate(prefers_color_scheme=scheme)
    gateway.status = fleet([*every_state().models, *short_and_degraded().models], draining=True, audit="wrong")
    show(browser, gateway)
    browser.until(lambda: browser.text("#banners"), "banners")
    dark = browser.read("getComputedStyle(document.body).backgroundColor") == "rgb(11, 15, 19)"
    assert dark is (scheme == "dark")
    found = browser.read(CONTRAST)
    assert len(found) > 100
    assert [entry for entry in found if entry[0] < 4.5] == []
    browser.read("document.querySelector('h1').style.color = getComputedStyle(document.body).backgroundColor")
    assert [entry for entry in browser.read(CONTRAST) if entry[0] < 4.5], "the measure finds what cannot be read"


def test_nothing_moves_for_those_who_want_it_still(browser: Browser, gateway: FakeGateway) -> None:
    show(browser, gateway)
    browser.until(lambda: browser.text("#connection") == "live", "it is live")
    moving = "document.getAnimations().filter((a) => a.animationName === 'breathe').length"
    assert browser.read(moving) == 1
    browser.emulate(prefers_reduced_motion="reduce")
    assert browser.read(moving) == 0


def test_tables_charts_and_fields_have_names(browser: Browser, gateway: FakeGateway) -> None:
    show(browser, gateway)
    assert browser.read("[...document.querySelectorAll('table caption')].map((c) => c.textContent)") == [
        "Endpoints of smollm2-135m",
        "Endpoints of llama-70b",
    ]
    browser.emulate(width=400)  # rows are laid out as cards, and are rows of a table all the same
    assert browser.read("document.querySelectorAll('tbody tr[role=row] > th[role=rowheader]').length") == 9
    assert browser.read("document.querySelectorAll('thead th[role=columnheader]').length") == 20
    unnamed = "[...document.querySelectorAll('[role=meter], svg[role=img]')].filter((n) => !n.ariaLabel).length"
    assert browser.read(unnamed) == 0
    assert browser.read("document.getElementById('key').labels.length") == 1
    ids = "[...document.querySelectorAll('[id]')].map((n) => n.id)"
    assert browser.read(f"new Set({ids}).size === {ids}.length")
