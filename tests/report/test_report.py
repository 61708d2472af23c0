"""The report as text: what is said, what is escaped, what is never lost."""

import json
import re
from html.parser import HTMLParser

import pytest
from mlx_bulwark.report import Report

HOSTILE = '</style></script><script>alert(1)</script><img src=x onerror=alert(1)>"\' onload="alert(1)'


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, words):
        self.words.append(words)


def hostile(value):
    """The same data with hostile words in place of every word but those that the adapters go by."""
    if isinstance(value, dict):
        kept = ("kind", "verdict", "norm", "test")
        return {k: v if k in kept else hostile(v) for k, v in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def attack(name, eps, accuracy):
    figures = {"robust_accuracy": accuracy, "attack_success_rate": 1 - accuracy / 0.9}
    rest = {"mean_distance": eps, "median_distance": eps, "mean_queries": 40.0, "seconds": 1.0}
    return {"name": name, "norm": "linf", "eps": eps} | figures | rest


def attacked(eps, accuracy, flags=()):
    figures = {"clean_accuracy": 0.9, "robust_accuracy": accuracy, "attack_success_rate": 1 - accuracy / 0.9}
    both = [attack("fgsm", eps, accuracy + 0.05), attack("pgd", eps, accuracy)]
    return {"kind": "robust_accuracy", "eps": eps, "inputs": 200, "attacks": both, "flags": list(flags)} | figures


def drifted(name, verdict, effect):
    figures = {"statistic": effect, "p_value": 1e-9, "p_adjusted": 1e-8, "effect": effect, "least_effect": 0.1}
    return {"name": name, "test": "ks", "verdict": verdict, "reason": "median 1, now 2", "psi": None} | figures


EXAMPLES = {
    "robust_accuracy": {"kind": "robust_accuracy", "runs": [attacked(0.1, 0.8), attacked(0.3, 0.1)]},
    "drift": {
        "kind": "drift",
        "drift": True,
        "alpha": 0.05,
        "reference_rows": 1000,
        "new_rows": 500,
        "results": [drifted("age", "drift", 0.4), drifted("city", "none", 0.02)],
    },
    "audit_log": {
        "kind": "audit_log",
        "ok": False,
        "verdict": "changed",
        "count": 7,
        "chain": "ab" * 32,
        "torn": 12,
        "findings": ["line 3 was changed"],
        "lines": [{"n": 1, "time": "2026-01-01T00:00:00Z", "kind": "gate.check", "fields": {"ok": True}}],
    },
    "unheard_of": {"kind": "unheard_of", "answer": 42, "deep": {"list": [1, {"x": None}]}},
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_kind_says_what_was_found_and_keeps_the_data(kind):
    report = Report("Report").add(EXAMPLES[kind])
    section = report.sections[0]
    assert section.verdict
    assert section.data == EXAMPLES[kind]
    assert section.status in ("problem", "attention") or kind == "unheard_of"
    if section.status != "info":
        assert section.advice
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
