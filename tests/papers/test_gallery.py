"""The gallery: what each card says, without JavaScript, and in a browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from tests.papers import _samples

from perturbkit.papers import discover, write_gallery
from perturbkit.papers.runner import fingerprint

NASTY = '<script>alert("x")</script> & "quotes"'
_VOID = {"meta", "link", "img", "input", "br"}


class _Page(HTMLParser):
    """Cards with their text, links and attributes; fails on a tag that is closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cards, self.urls, self.scripts, self.events = [], {}, [], 0, []
        self.card = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.scripts += tag == "script"
        self.urls += [v for k, v in attrs if k in ("src", "href")]
        self.events += [k for k in values if k.startswith("on")]
        if tag == "article":
            self.card = self.cards[values["id"]] = {"text": "", "images": [], **values}
        if tag == "img":
            self.card["images"].append(values)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "article":
            self.card = None

    def handle_data(self, data):
        if self.card is not None and self.open[-1] != "script":
            self.card["text"] += data


def _save(out, record, **values):
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    row = {
        "metric": NASTY,
        "ours": 0.25,
        "baseline": None,
        "direction": "lower",
        "margin": 0.0,
        "factor": 0.5,
    }
    row |= {"spread": 0.125, "n": 5, "control": False, "note": "a note", "holds": True}
    outcome = {"key": record.key, "package": record.package, "holds": True, "error": None, "seconds": 1.25}
    outcome |= {
        "comparisons": [row],
        "notes": NASTY,
        "seed": 3,
        "fingerprint": fingerprint(record),
        "figure": False,
    }
    (folder / f"{record.key}.json").write_text(json.dumps(outcome | values))


@pytest.fixture
def site(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    for number, key in enumerate(["holds", "fails", "errors", "unrun", "stale"]):
        text = {"title": NASTY, "claim": NASTY} if key == "holds" else {"title": f"About {key}"}
        _samples.write(root, f"alpha/{key}", number=number + 1, input="image, text", **text)
    (root / "alpha" / "broken.py").write_text("def <f>(:")
    by_key = {r.key: r for r in discover(root)}
    _save(out, by_key["holds"], figure=True)
    (out / "results" / "holds.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="4" height="3"/>'
    )
    _save(out, by_key["fails"], holds=False)
    _save(out, by_key["errors"], holds=False, error="ValueError: <b>", comparisons=[])
    _save(out, by_key["stale"], fingerprint="other")
    return write_gallery(discover(root), out)


def test_each_card_has_its_verdict_and_numbers(site):
    cards = _Page(site.read_text("utf-8")).cards
    states = {key: card["data-state"] for key, card in cards.items()}
    wanted = {"holds": "holds", "fails": "fails", "errors": "error", "unrun": "none", "stale": "holds"}
    assert states == wanted | {"broken": "error"}
    text = re.sub(r"\s+", " ", cards["holds"]["text"])
    for said in (
        NASTY,
        "✓",
        "as asked",
        "0.25",
        "not finite",
        "≤ 0.5 × baseline",
        "± 0.125",
        "n = 5",
        "a note",
    ):
        assert said in text
    for said in (
        "Ada, Bob, 2020, arXiv:2001.00001",
        "n rows; this run 1.2 s, seed 3",
        "perturbkit/core/oracle.py",
    ):
        assert said in text
    assert "alpha/holds.py" in text
    assert "does not hold" in cards["fails"]["text"]
    assert "ValueError: <b>" in cards["errors"]["text"]
    assert "perturbkit papers reproduce unrun" in cards["unrun"]["text"]
    assert "has changed since" in cards["stale"]["text"]
    assert "has changed since" not in text
    assert "cannot be parsed" in cards["broken"]["text"]
    assert cards["holds"]["data-input"] == "image text"


def test_figures_stand_beside_the_page_with_an_alternative_text(site):
    cards = _Page(site.read_text("utf-8")).cards
    (image,) = cards["holds"]["images"]
    assert (site.parent / image["src"]).exists()
    assert NASTY in image["alt"]
    assert all(not card["images"] for key, card in cards.items() if key != "holds")


def test_samples_are_shown_where_they_are_there(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    _samples.write(root, "alpha/a")
    (record,) = discover(root)
    names = ["two_digits.png", "tone.wav", "gone.png", "../../x.png", "<b>.png"]
    _save(out, record, samples=names)
    for name in names[:2]:
        (out / "results" / f"a.{name}").write_bytes(b"x")
    page = _Page(write_gallery([record], out).read_text("utf-8"))
    assert [u for u in page.urls if u.startswith("results/")] == [
        "results/a.two_digits.png",
        "results/a.tone.wav",
    ]
    assert page.cards["a"]["images"][0]["alt"] == "Sample: two digits"


def test_nothing_is_asked_of_another_host_and_all_text_is_escaped(site):
    text = site.read_text("utf-8")
    page = _Page(text)
    assert page.scripts == 1
    assert page.events == []
    assert all(re.match(r"(#|results/|data:,)", url) for url in page.urls), page.urls
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert "<script>alert" not in text


def test_the_page_names_no_folder_of_this_machine(site):
    assert str(site.parent) not in site.read_text("utf-8")


def test_everything_but_the_filters_shows_without_javascript(site):
    text = site.read_text("utf-8")
    assert re.findall(r"<(\w+)[^>]* hidden[ >]", text) == ["form", "p"]


def test_an_empty_gallery_says_so(tmp_path):
    assert "There are no reproductions here." in write_gallery([], tmp_path / "new").read_text("utf-8")


def _browser():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(_browser() is None, reason="needs Chromium")
def test_filters_and_layout_in_a_browser(site):
    # The page's own script first; then this one types and measures, and its finding is read from the page.
    probe = """<script>
const visible = () => [...document.querySelectorAll(".card")].filter((c) => !c.hidden).map((c) => c.id).join(" ");
const put = (node, value) => { node.value = value; node.dispatchEvent(new Event("input", { bubbles: true })); };
const words = document.getElementById("words"), verdict = document.querySelector("[data-field=state]");
const found = { wide: document.documentElement.scrollWidth > innerWidth, form: !document.getElementById("filters").hidden };
put(words, "ABOUT unrun"); found.words = visible(); put(words, "");
put(verdict, "error"); found.verdict = visible(); put(words, "zebra"); found.nothing = visible();
found.said = !document.getElementById("nothing").hidden; found.alert = typeof window.hurt;
document.title = JSON.stringify(found);
</script></body>"""
    copy = site.with_name("probe.html")
    copy.write_text(site.read_text("utf-8").replace("</body>", probe), encoding="utf-8")
    command = [
        _browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=500,900",
        "--dump-dom",
    ]
    result = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r"<title>(.*?)</title>", result.stdout)[1])
    assert found["form"]
    assert not found["wide"]
    assert found["words"] == "unrun"
    assert found["verdict"] == "broken errors"
    assert found["nothing"] == ""
    assert found["said"]
