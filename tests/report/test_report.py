"""The report as text: what is said, what is escaped, what is never lost."""

import importlib
import json
import re
from html.parser import HTMLParser

import pytest
from mlx_bulwark.report import Report
from mlx_bulwark.report.glossary import WORDS, explained
from mlx_bulwark.report.svg import bar_chart
from report_examples import EXAMPLES

HOSTILE = '</style></script><script>alert(1)</script><img src=x onerror=alert(1)>"\' onload="alert(1)'


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, words):
        self.words.append(words.replace("\N{NO-BREAK SPACE}%", " %"))


def hostile(value):
    """The same data with hostile words in place of every word but those that the adapters go by."""
    if isinstance(value, dict):
        kept = ("kind", "verdict", "norm", "test", "png")
        return {k: v if k in kept else hostile(v) for k, v in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_kind_says_what_was_found_and_keeps_the_data(kind):
    report = Report("Report").add(EXAMPLES[kind])
    section = report.sections[0]
    assert section.verdict
    assert section.data == EXAMPLES[kind]
    assert section.status == {"certificates": "good", "outliers": "attention", "unheard_of": "info"}.get(
        kind, "problem"
    )
    assert bool(section.advice) == (section.status in ("problem", "attention"))
    assert section.verdict in " ".join(Page(report.html()).words)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_hostile_words_stay_words(kind):
    calm = Page(Report("t").add(EXAMPLES[kind]).html())
    page = Page(Report(HOSTILE).add(hostile(EXAMPLES[kind]), title=HOSTILE).html())
    assert {t for t, _ in page.tags} <= {t for t, _ in calm.tags} | {"div", "li", "p", "ul", "b", "td"}
    assert "script" not in {t for t, _ in page.tags}
    assert not [a for t, a in page.tags if any(name.startswith("on") or name == "style" for name in a)]
    assert HOSTILE in "".join(page.words)
    assert not [a for _, a in page.tags if str(a.get("src", "data:image/png;")).find("data:image/png;") != 0]


def test_data_of_a_known_kind_but_another_form_are_shown_as_they_are():
    report = Report("t").add({"kind": "drift", "results": "none", "answer": 42})
    assert report.status == "attention"
    assert "42" in " ".join(Page(report.html()).words)


def test_nothing_from_outside_is_named():
    page = Report("t")
    for data in EXAMPLES.values():
        page.add(data)
    text = page.html()
    assert not re.findall(r"(?:src|href|action)=\"(?!#|data:)", text)
    assert "url(" not in text
    assert "@import" not in text


def test_json_beside_the_page_reads_back(tmp_path):
    report = Report("t")
    for data in EXAMPLES.values():
        report.add(json.dumps(data))
    beside = report.write(tmp_path / "page.html")
    content = json.loads(beside.read_text(encoding="utf-8"))
    assert (content["kind"], content["version"], content["verdict"]) == ("report", 1, report.verdict)
    assert [s["data"] for s in content["sections"]] == list(EXAMPLES.values())
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.html()


@pytest.mark.parametrize("bad", ["[1]", "no json", 7, "[" * 100_000])
def test_what_is_no_object_is_refused(bad):
    with pytest.raises(ValueError, match=r"\[Report.add\] found must"):
        Report("t").add(bad)


def test_the_words_of_the_field_are_explained_and_no_others():
    pages = {kind: dict(explained(Report("a").add(data).sections)) for kind, data in EXAMPLES.items()}
    assert "Epsilon, delta" in pages["privacy"]
    assert "Backdoor" not in pages["privacy"]
    assert {"PGD, APGD, FGSM", "Robust accuracy"} <= pages["robust_accuracy"].keys()
    assert "Certified accuracy" in pages["certificates"]
    assert "Manifest" in pages["manifest"]
    assert "Drift" in pages["monitor"]
    assert "L-infinity, L2, L1" in pages["robust_accuracy"]
    modules = (importlib.import_module(f"mlx_bulwark.poison.{name}") for name in ("scan", "inspect"))
    for method in (m for module in modules for m in module.METHODS):
        name = method.replace("_", " ")
        assert any(re.search(where, name) for where, _ in WORDS.values()), name
    assert list(WORDS) == sorted(WORDS, key=str.lower)
    assert explained([]) == []


def test_next_to_no_drift_looks_like_it():
    svg = bar_chart("Effect sizes", "effect size", ["age", "height"], [0.0025, 0.5], [False, True])
    small, half = (float(w) for w in re.findall(r'<rect class="bar[^>]* width="([\d.]+)"', svg))
    alone = bar_chart("Effect sizes", "effect size", ["age"], [0.0025], [False])
    (only,) = (float(w) for w in re.findall(r'<rect class="bar[^>]* width="([\d.]+)"', alone))
    assert only < 3
    assert small < half / 100
