"""The report page in a browser: on a desk and on a phone, by day and by night, by mouse, keyboard and screen reader."""

import base64
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

import perturbkit.audit as audit
from perturbkit.audit.demo import demo_subject
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.runner import conduct

sys.path.insert(0, str(Path(__file__).parent))
from _browser import browser, look, needs_browser, served

pytestmark = [pytest.mark.browser, needs_browser]
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
# The photographs take a minute an audit: of them only what needs no gradient, which draws every kind of figure but heat maps.
ONLY = {
    "image": ("sanity", "calibration", "conformal", "weakest", "slices"), "tabular": (), "text": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The reports of the three demos, one folder each, and one whose names are hostile."""
    where = tmp_path_factory.mktemp("reports")
    for kind, only in ONLY.items():
        request = AuditRequest(n=24, seed=1, out=where / kind).selecting(only)
        gates = {"sanity.accuracy": ">= 0.5", "calibration.ece": "<= 0.5"}
        conduct(lambda kind=kind: demo_subject(kind), request, gates=gates, progress=False)
    return where


@pytest.fixture(scope="module")
def driver():
    with browser() as opened:
        yield opened


@pytest.fixture(params=list(ONLY))
def page(request, folder, driver):
    """Open a demo's report and yield the driver; nothing but the page itself may be asked for, and nothing complained of."""
    driver.get_log("performance")
    with served(folder / request.param) as (address, asked):
        driver.get(f"{address}/report.html")
        yield driver
        sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        assert [u for u in urls if not u.startswith(("data:", f"{address}/report.html"))] == []
        assert set(asked) == {"/report.html"}
        assert [e for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []


def test_nothing_is_wider_than_the_screen_and_every_figure_is_drawn(page):
    for width in WIDTHS:
        for scheme in SCHEMES:
            look(page, width, scheme)
            assert page.execute_script("return document.documentElement.scrollWidth") <= width
            drawn = page.execute_script(
                "return [...document.querySelectorAll('figure img')].map(i => i.complete && i.naturalWidth > 0)"
            )
            assert len(drawn) >= 5
            assert all(drawn)


def test_the_reader_chooses_the_colours(page):
    grounds = {}
    for scheme in SCHEMES:
        look(page, 1280, scheme)
        colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        grounds[scheme] = sum(int(v) for v in re.findall(r"\d+", colour)[:3])
    assert grounds["dark"] < 150 < 700 < grounds["light"]


def test_landmarks_and_headings_are_in_order(page):
    look(page, 1280, "light")
    marks = page.execute_script(
        "return [...document.body.children].map(e => e.tagName.toLowerCase()).filter(t => t != 'a')"
    )
    assert marks == ["header", "nav", "main", "footer"]
    levels = page.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    # Every line of the summary leads to a section that is there.
    links = page.execute_script(
        "return [...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.getAttribute('href')))"
    )
    assert links
    assert all(links)


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page):
    from selenium.webdriver.common.keys import Keys

    look(page, 1280, "light")
    page.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
    body, seen = page.find_element("css selector", "body"), []
    for _ in range(25):
        (page.switch_to.active_element if seen else body).send_keys(Keys.TAB)
        seen.append(
            page.execute_script(
                "const e = document.activeElement, s = getComputedStyle(e);"
                "return [e.tagName, e.textContent.trim().slice(0, 30), s.outlineStyle, parseFloat(s.outlineWidth)]"
            )
        )
    assert seen[0][1] == "Skip to the findings"
    assert {"A", "DIV", "FIGURE"} <= {tag for tag, *_ in seen}
    assert all(style != "none" and width >= 2 for _, _, style, width in seen)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_no_serious_violation(page, scheme):
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is an extra of the tests")
    source = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    for width in WIDTHS:
        look(page, width, scheme)
        # Closed details are opened, so that what they hold is judged as well.
        page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        # By the debugger, since the page itself allows no script.
        page.execute_cdp_cmd("Runtime.evaluate", {"expression": source})
        found = page.execute_cdp_cmd(
            "Runtime.evaluate",
            {
                "expression": "axe.run().then(r => JSON.stringify(r))",
                "awaitPromise": True,
                "returnByValue": True,
            },
        )
        result = json.loads(found["result"]["value"])
        assert len(result["passes"]) > 15
        grave = [
            (v["id"], v["nodes"][0]["html"][:120])
            for v in result["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert grave == []


def test_what_is_folded_is_printed(page):
    look(page, 1280, "dark")
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = false)")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    heights = page.execute_script(
        "return [...document.querySelectorAll('dl, details table')].map(e => e.offsetHeight)"
    )
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    printed = page.execute_cdp_cmd("Page.printToPDF", {})["data"]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert heights
    assert min(heights) > 0
    assert ground == "rgb(255, 255, 255)"
    assert base64.b64decode(printed)[:5] == b"%PDF-"


def test_hostile_names_are_shown_and_not_run(tmp_path, driver):
    import torch

    hostile = "<img src=x onerror=alert(1)>"
    x = torch.linspace(-1, 1, 40)[:, None].repeat(1, 2)
    y = (x[:, 0] > 0).long()

    class Shown(torch.nn.Module):
        def forward(self, x):
            return torch.stack([-x[:, 0], x[:, 0]], 1)

    import pandas as pd

    frame = pd.DataFrame(x.numpy(), columns=[hostile, "plain"])
    audit.run(Shown().eval(), (frame, y), only=["explain", "weakest", "slices"], out=tmp_path, progress=False)
    with served(tmp_path) as (address, asked):
        driver.get(f"{address}/report.html")
        assert hostile in driver.find_element("css selector", "main").get_attribute("textContent")
        assert driver.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
        assert asked == ["/report.html"]
