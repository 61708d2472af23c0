"""The page in headless Chromium: seen, heard, walked through by keyboard, in both themes and two widths."""

import json
import os
import shutil
from datetime import datetime, timezone
from itertools import pairwise

import pytest
from mlx_bulwark.report import Report
from report_examples import EXAMPLES

WIDTHS = (400, 1280)
THEMES = ("light", "dark")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

CONTRAST = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = colour => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data;
};
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const ground = e => {
  for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; }
  return rgba('white');
};
const poor = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || e.tagName === 'title') continue;
  const style = getComputedStyle(e);
  const ink = rgba(e.closest('svg') ? style.fill : style.color);
  const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  seen++;
  if (ratio < 4.5 || ink[3] < 255) poor.push([ratio, walk.currentNode.data.trim()]);
}
return [seen, poor];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        words = "chromium and chromedriver are needed to look at the report but are missing"
        (pytest.fail if os.environ.get("BULWARK_EXPECT_BROWSER") == "1" else pytest.skip)(words)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    report = Report("Security assessment", created=datetime(2026, 1, 1, tzinfo=timezone.utc))
    for data in EXAMPLES.values():
        report.add(data)
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write(path)
    return path


@pytest.fixture(params=[(w, t) for w in WIDTHS for t in THEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def shown(browser, page, request):
    width, theme = request.param
    preference = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    return browser


def test_headings_pictures_and_a_quiet_console(shown, page):
    levels = shown.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert levels[:2] == [1, 2]
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert levels.count(2) == len(EXAMPLES) + 2, "sections, the verdict and the words"
    pictures = shown.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(pictures) == 7
    assert all(complete and width > 0 and alt for complete, width, alt in pictures)
    drawings = shown.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => { const b = s.getBBox(); "
        "const v = s.viewBox.baseVal; return [b.width, b.height, s.getAttribute('aria-label'), "
        "b.x >= -1, b.y >= -1, b.x + b.width <= v.width + 1, b.y + b.height <= v.height + 1]; })"
    )
    assert len(drawings) == 5
    assert all(width > 200 and height > 50 and all(rest) for width, height, *rest in drawings), "clipped or empty"
    assert shown.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in shown.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert {u for u in urls if not u.startswith("data:")} == {page.as_uri()}


def test_nothing_hangs_over_the_edge(shown):
    width = shown.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    clipped = shown.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3,p,li,dt,dd,figcaption,.badge')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')"
        ".map(e => e.textContent)"
    )
    assert clipped == []
    stacked = shown.execute_script(
        "return [...document.querySelectorAll('.stacks')].map(t => [t.offsetWidth, t.parentElement.clientWidth])"
    )
    assert len(stacked) >= 3
    assert all(width <= room for width, room in stacked)


def test_all_text_stands_out_from_its_ground(shown):
    seen, poor = shown.execute_script(CONTRAST)
    assert seen > 300
    assert poor == []


def test_themes_differ_and_can_be_chosen(shown):
    ground = "return getComputedStyle(document.body).backgroundColor"
    preferred = shown.execute_script(ground)
    chosen = {}
    for theme in THEMES:
        shown.execute_script(f"document.getElementById('theme-{theme}').click()")
        chosen[theme] = shown.execute_script(ground)
    assert chosen["light"] != chosen["dark"]
    dark = shown.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
    assert preferred == chosen["dark" if dark else "light"]


def test_the_keyboard_reaches_everything_in_order(browser, page):
    from selenium.webdriver.common.keys import Keys

    browser.get(page.as_uri())
    wanted = browser.execute_script(
        "return [...document.querySelectorAll('a[href], [tabindex=\"0\"], input:checked')].map(e => e.outerHTML)"
    )
    reached, outlines = [], []
    for _ in wanted:
        browser.switch_to.active_element.send_keys(Keys.TAB)
        html, outline, name = browser.execute_script(
            "const e = document.activeElement; return [e.outerHTML, getComputedStyle(e).outlineStyle, "
            "e.ariaLabel || e.textContent || e.labels?.[0].textContent || '']"
        )
        reached.append(html)
        outlines.append(outline)
        assert name.strip()
    assert reached == wanted
    assert set(outlines) == {"solid"}


def test_landmarks_tables_and_regions_have_names(browser, page):
    browser.get(page.as_uri())
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names = {}
    for node in tree:
        if not node.get("ignored"):
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("main", "banner", "contentinfo"):
        assert len(names[role]) == 1
    for role in ("region", "table", "image", "columnheader", "rowheader", "link", "radio"):
        assert names[role]
        assert all(names[role]), role
    headers = "return [...document.querySelectorAll('th')].every(th => ['row', 'col'].includes(th.scope))"
    assert browser.execute_script(headers)
    assert browser.execute_script("return document.documentElement.lang") == "en"


def test_a_hostile_report_runs_nothing(browser, tmp_path):
    words = "</style></script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    report = Report(words)
    for data in EXAMPLES.values():
        report.add(json.loads(json.dumps(data).replace("pgd", "P").replace("age", "A")) | {words: words}, title=words)
    report.write(tmp_path / "hostile.html")
    browser.get_log("browser")
    browser.get((tmp_path / "hostile.html").as_uri())
    assert browser.title == words
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
