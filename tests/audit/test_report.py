"""The report page in a real browser, and what a report offers in Python."""

import functools
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest

import perturbkit.audit as audit
from perturbkit.core import checks
from perturbkit.papers.records import discover

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = audit.run(
        _subjects.image_model(),
        _subjects.images(),
        gates={"sanity.accuracy": ">= 0.5"},
        out=folder,
        progress=False,
    )
    return report, folder


def test_frame_has_every_number(saved):
    frame = saved[0].to_frame()
    assert set(frame.section) == {f.section for f in saved[0].findings}
    line = frame[(frame.section == "attack") & (frame.metric == "radius.median")].iloc[0]
    assert line.low <= line.value <= line.high


def test_every_section_cites_methods_that_exist(saved):
    known = {record.key for record in discover()}
    cited = {f.section: f.papers for f in saved[0].findings}
    assert {key for keys in cited.values() for key in keys} <= known
    for section, key in (("calibration", "calibration_errors"), ("attack", "fast_minimum_norm"), ("conformal", "split_conformal"), ("corruption", "corrupt"), ("faithfulness", "deletion_curve")):  # fmt: skip
        assert key in cited[section]


def test_check_and_indexing(saved):
    report, _ = saved
    assert report.check({"sanity.accuracy": ">= 0.5"}).passed
    assert not report.check({"sanity.accuracy": {"min": 1.01, "on": "estimate"}}).passed
    with pytest.raises(checks.ArgumentError, match="section is 'sanitty'; allowed: sanity"):
        report["sanitty"]


def test_notebook_summary_is_escaped():
    p, y = _subjects.calibrated(100)
    report = audit.run(predictions=p, labels=y, only=["calibration"], progress=False)
    named = type(report)(**{**report.__dict__, "model": "<b>x</b>"})
    html = named._repr_html_()
    assert "&lt;b&gt;x" in html
    assert "<b>x" not in html


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 99}', '{"schema": 1}', "[1]"])
def test_damaged_audit_json(tmp_path, text):
    path = tmp_path / "audit.json"
    path.write_text(text)
    with pytest.raises(checks.DataError, match="allowed"):
        audit.load_report(path)


@pytest.mark.parametrize("value", [None, "0.5", [1], {"float": "much"}])
def test_a_number_that_is_none_is_refused(tmp_path, value):
    p, y = _subjects.calibrated()
    report = audit.run(predictions=p, labels=y, only=["calibration"], progress=False)
    data = report.to_dict()
    data["findings"][0]["metrics"]["tuple"][0]["value"] = value
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(data))
    with pytest.raises(checks.DataError, match=r"is damaged.*allowed"):
        audit.load_report(path)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="Chromium and its driver are not installed")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(saved, width):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is an extra of the tests")
    from selenium.webdriver.chrome.service import Service

    _, folder = saved
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--window-size={width},900",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(f"http://127.0.0.1:{server.server_address[1]}/report.html")
        errors = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "ERROR")]
        assert errors == []
        shown = [s.get_attribute("id") for s in driver.find_elements("css selector", "main > section")]
        assert shown == ["gates", *audit.SECTIONS]
        drawn = driver.execute_script(
            "return [...document.querySelectorAll('figure img')].map(i => i.complete && i.naturalWidth > 0)"
        )
        assert len(drawn) == len(audit.SECTIONS)
        assert all(drawn)
        # Nothing is wider than the screen: tables scroll inside their own box.
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert requests == ["/report.html"]
        assert driver.execute_script("return document.scripts.length") == 0
    finally:
        driver.quit()
        server.shutdown()
