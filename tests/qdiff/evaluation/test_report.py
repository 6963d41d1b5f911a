"""The HTML report: everything is in one file, readable without a network, safe, and it works in a browser."""

import base64
import csv
import importlib.util
import io
import os
import re
import shutil
import time
from html.parser import HTMLParser

import pytest
import torch

from qdiff.evaluation.report import (
    Chart,
    Charts,
    Code,
    Command,
    Facts,
    Folded,
    Heading,
    Report,
    Section,
    Table,
    Text,
    render,
    slug,
    write,
)
from qdiff.evaluation.report_charts import Bar, Line, heat_map, line_chart, looks, spans, sparkline
from qdiff.evaluation.report_images import make_gallery

HOSTILE = "</script><script>alert('\"&{{ 7 * 7 }}')</script><img src=https://example.com/x.png>"
VOID = {"meta", "link", "img", "input", "br"}
COLUMNS = [("name", "name", "s"), ("value", "value (dB)", ".2f"), ("count", "count", "d")]
ROWS = [
    {"name": HOSTILE, "value": 1 / 3, "count": 7},
    {"name": 'with "quotes", and commas', "value": None, "count": -1},
    {"name": "inf", "value": float("inf"), "count": 123456789},
]
WIDE = Table(
    "A wide table", [(f"k{i}", f"column {i}", ".6f") for i in range(30)], [{f"k{i}": i / 7 for i in range(30)}]
)


@pytest.fixture(scope="module")
def report():
    """A page with every kind of block, and labels that try to be markup."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(5, 3, 16, 16, generator=generator)
    entries = [(name, "30.0 dB", torch.rand(5, 3, 16, 16, generator=generator)) for name in ("nearest W4A8", HOSTILE)]
    curves = [Line(name, [1.0, 0.1, None, 0.01], look) for (name, _, _), look in zip(entries, looks("ab"), strict=True)]
    drawings = [sparkline([1, 0.5, 0.25], HOSTILE)] * len(ROWS)
    sections = [
        Section(
            "Command", [Command(f"python x.py {HOSTILE} " + "--long " * 40), Facts([("seed", "1"), ("a", HOSTILE)])]
        ),
        Section("Tables", [Table(HOSTILE, COLUMNS, ROWS, HOSTILE, drawings, "loss", best=0), WIDE, Text(HOSTILE)]),
        Section("Images", [make_gallery(reference, entries)]),
        Section(
            "Charts",
            [
                Heading(HOSTILE),
                Charts([Chart(HOSTILE, line_chart(curves, HOSTILE, "step", "error"))], [("c0 d0", HOSTILE)], HOSTILE),
                Charts([Chart("spans", spans([Bar(HOSTILE, -1, 2)], "spans", HOSTILE, "value"))]),
                Charts([Chart("map", heat_map([HOSTILE], ["1", "2"], [[0.1, 10]], HOSTILE, "t", [1]))]),
                Folded(HOSTILE, [Table("Folded", COLUMNS, ROWS), Code(HOSTILE + "x" * 300)]),
            ],
        ),
    ]
    return Report(HOSTILE, HOSTILE, "about", sections)


@pytest.fixture(scope="module")
def page(report):
    return render(report)


class Reader(HTMLParser):
    """Elements with their attributes and their text; fails where tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.open], **{k: v or "" for k, v in attrs}}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


@pytest.fixture(scope="module")
def elements(page):
    return Reader(page)


def test_nothing_is_loaded_from_elsewhere(page, elements):
    for element in elements.elements:
        for key in ("src", "href", "srcset", "data", "action", "poster"):
            assert element.get(key, "#").startswith(("data:", "#")), element
    style = elements.all("style")[0]["text"]
    assert "url(" not in style and "@import" not in style and "http" not in style
    (policy,) = [meta["content"] for meta in elements.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy and "http" not in policy
    assert len(page) < 200_000


def test_labels_are_text_whatever_they_say(elements):
    """One script, which is ours, and as many images as the gallery has; the hostile label shows as it is."""
    (script,) = elements.all("script")
    assert "alert" not in script["text"] and len(elements.all("img")) == 5
    for tag in ("title", "h1", "h3", "td", "th", "figcaption", "summary", "dd", "pre", "text", "p", "li"):
        assert any(HOSTILE in element["text"] for element in elements.all(tag)), tag


def test_every_table_has_itself_as_csv(elements):
    links = [element for element in elements.all("a") if "download" in element]
    assert len(links) == len(elements.all("table")) == 3
    assert [link["download"] for link in links] == [f"{slug(HOSTILE)}.csv", "a-wide-table.csv", "folded.csv"]
    for link, table in zip(links, (Table("", COLUMNS, ROWS), WIDE, Table("", COLUMNS, ROWS)), strict=True):
        kind, content = link["href"].split(",")
        assert kind == "data:text/csv;charset=utf-8;base64" and link["aria-label"].endswith("as CSV")
        found = list(csv.reader(io.StringIO(base64.b64decode(content).decode(), newline="")))
        assert found[0] == [header for _, header, _ in table.columns]
        values = [["" if row[key] is None else str(row[key]) for key, _, _ in table.columns] for row in table.rows]
        assert found[1:] == values  # numbers with all their digits


def test_what_a_table_shows(elements):
    table = elements.all("table")[0]
    cells = [e for e in elements.elements if e["tag"] == "td" and e["inside"].count("details") == 0][:9]
    assert [cell["text"] for cell in cells if cell.get("class") == "n"] == ["0.33", "7", "–", "−1", "–", "123456789"]
    assert table["text"].count("loss") == 1 and sum(e.get("class") == "spark" for e in elements.all("svg")) == 3
    assert [row.get("class") for row in elements.all("tr")[1:4]] == ["best", None, None]


def test_structure_for_those_who_do_not_see_it(elements):
    assert elements.all("html")[0]["lang"] == "en" and len(elements.all("main")) == 1
    levels = [int(e["tag"][1]) for e in elements.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= before + 1 for before, later in zip(levels, levels[1:], strict=False))
    assert all(image["alt"].strip() for image in elements.all("img"))
    for drawing in elements.all("svg"):
        assert drawing.get("aria-hidden") == "true" or drawing["role"] == "img"
    titled = sum(e["inside"][-1] == "svg" and bool(e["text"]) for e in elements.all("title"))
    assert titled == sum(svg.get("role") == "img" for svg in elements.all("svg"))
    ids = [element["id"] for element in elements.elements if "id" in element]
    named = [element[key] for element in elements.elements for key in ("aria-labelledby",) if key in element]
    anchors = [element["href"][1:] for element in elements.all("a") if element["href"].startswith("#")]
    assert len(set(ids)) == len(ids) and set(named) | set(anchors) <= set(ids) and len(anchors) == 4
    assert all(e["aria-label"] for e in elements.all("input") if e["type"] == "range")
    assert all(th["scope"] in ("col", "row") for th in elements.all("th"))


def test_the_same_report_is_the_same_file(report, page, tmp_path):
    write(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf8") == page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_an_empty_table_and_a_page_without_sections():
    text = render(Report("t", "h", "a", [Section("s", [Table("none", COLUMNS, [])])]))
    Reader(text)
    assert render(Report("t", "h", "a", []))


# In a browser: what a page does, not what it says.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, on a page 1280 pixels wide; downloads go to its `downloads`."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None or importlib.util.find_spec("selenium") is None:
        pytest.skip("needs chromium, chromedriver and selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", *["--no-sandbox"] * (os.geteuid() == 0)):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    found = webdriver.Chrome(options=options, service=Service(driver))
    found.downloads = folder
    yield found
    found.quit()


@pytest.fixture
def opened(browser, page, tmp_path):
    """(width) -> the browser with the page, as wide as that."""

    def open_page(width=1280, media="", **features):
        path = tmp_path / "report.html"
        path.write_text(page, encoding="utf8")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": wanted})
        browser.get(path.as_uri())
        return browser

    return open_page


def style(browser, selector, name):
    """A computed property of the first element that fits."""
    return browser.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{name}")


def test_no_errors_and_nothing_asked_for(opened):
    browser = opened()
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_the_slider_moves_the_line(opened):
    """By keyboard, and by pointing at the images; the float model's lie over the others, left of the line."""
    from selenium.webdriver import ActionChains, Keys

    browser = opened()
    covered = "getComputedStyle(document.querySelector('.over')).clipPath"
    assert browser.execute_script(f"return {covered}") == "inset(0px 50% 0px 0px)"
    reference, over = browser.execute_script(
        "return ['.reference img', '.over'].map(s => document.querySelector(s).src)"
    )
    assert reference == over
    slider = browser.find_element("css selector", "input[type=range]")
    slider.send_keys(Keys.ARROW_LEFT * 4)
    assert browser.execute_script(f"return {covered}") == "inset(0px 52% 0px 0px)"
    slider.send_keys(Keys.HOME)
    assert browser.execute_script(f"return {covered}") == "inset(0px 100% 0px 0px)"
    stage = browser.find_element("class name", "stage")
    ActionChains(browser).move_to_element_with_offset(stage, stage.size["width"] // 4, 0).click().perform()
    assert abs(float(slider.get_property("value")) - 75) < 1
    second = browser.find_elements("css selector", "input[type=range]")[1]
    assert second.get_property("value") == "50"  # each entry has its own


def test_the_difference_takes_the_place_of_the_images(opened):
    browser = opened()
    assert style(browser, ".difference", "display") == "none" and style(browser, ".stage", "display") == "block"
    browser.find_element("css selector", ".views label:last-child").click()
    assert style(browser, ".difference", "display") == "block" and style(browser, ".stage", "display") == "none"
    assert style(browser, ".slider", "display") == "none"


def test_the_csv_button_downloads_the_table(opened):
    browser = opened()
    browser.find_elements("class name", "csv")[1].click()
    path = browser.downloads / "a-wide-table.csv"
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.read_bytes().decode() == WIDE.csv


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_only_tables_scroll_sideways(opened, width):
    """With everything unfolded."""
    browser = opened(width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = "return [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth > e.clientWidth)"
    assert browser.execute_script(wide)[1]
    assert style(browser, ".pixelated", "imageRendering") == "pixelated"


def test_dark_and_light(opened):
    def brightness(browser, name):
        colour = style(browser, "body", name)
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765

    light = opened(prefers_color_scheme="light")
    assert brightness(light, "backgroundColor") > 0.9 > 0.3 > brightness(light, "color")
    dark = opened(prefers_color_scheme="dark")
    assert brightness(dark, "color") > 0.8 > 0.2 > brightness(dark, "backgroundColor")


def test_on_paper(opened):
    """Black on white, no controls, images and differences both, tables not cut off."""
    browser = opened(media="print", prefers_color_scheme="dark")
    for selector in (".slider", ".views", ".csv", "nav", ".over"):
        assert style(browser, selector, "display") == "none", selector
    assert style(browser, ".stage", "display") == style(browser, ".difference", "display") == "block"
    assert style(browser, ".scroll", "overflowX") == "visible"
    assert style(browser, "body", "backgroundColor") == "rgb(255, 255, 255)"


def test_without_javascript(opened):
    """Everything is shown: images and differences below each other, no controls that would do nothing."""
    opened().execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser = opened()
        shown = {
            selector: browser.find_element("css selector", selector).is_displayed()
            for selector in (".stage img", ".difference img", ".slider", ".views", ".csv")
        }
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert shown == {".stage img": True, ".difference img": True, ".slider": False, ".views": False, ".csv": True}
