"""Titles, memories and model answers that try to run code stay text on the page, in its plots and on the terminal."""

import html.parser
import io
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from recollect.errors import InputError
from recollect.eval.formats import clean
from recollect.eval.report import rebuild, render_html, summary_table
from recollect.io import write_json
from recollect.types import Report

ACT = "document.documentElement.setAttribute('data-pwned',1)"

# (open, close) that try to leave a text node, a quoted attribute, a comment, a style, a script, an SVG text.
ESCAPES = [
    "",
    '">',
    "'>",
    "-->",
    "</style>",
    "</title>",
    "</textarea>",
    "</svg>",
    "]]>",
    "</text></g></svg>",
    "*/</style>",
]

ACTIVE = [
    f"<script>{ACT}</script>",
    f"<ScRiPt >{ACT}</ScRiPt>",
    f"<img src=x onerror={ACT}>",
    f'<img src="x" onerror="{ACT}">',
    f"<svg onload={ACT}>",
    f"<svg/onload={ACT}//",
    f"<svg><script>{ACT}</script></svg>",
    f"<svg><animate onbegin={ACT} attributeName=x dur=1s>",
    f"<body onload={ACT}>",
    f"<details open ontoggle={ACT}>",
    f"<iframe srcdoc='<script>parent.{ACT}</script>'></iframe>",
    f'<iframe src="javascript:{ACT}"></iframe>',
    f'<a href="javascript:{ACT}" autofocus onfocus={ACT}>x</a>',
    f"<input autofocus onfocus={ACT}>",
    f"<video><source onerror={ACT}></video>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={ACT}>",
    f"<object data='data:text/html,<script>{ACT}</script>'></object>",
    f"<embed src='data:text/html,<script>{ACT}</script>'>",
    "<meta http-equiv=refresh content='0;url=javascript:1'>",
    "<base href='http://evil.invalid/'>",
    "<link rel=stylesheet href='http://evil.invalid/x.css'>",
    "<form action='http://evil.invalid/'><button>go</button></form>",
    f"<template><script>{ACT}</script></template>",
    f"<noscript><p title='</noscript><img src=x onerror={ACT}>'>",
]

PLAIN = [
    f"javascript:{ACT}",
    f"' onmouseover='{ACT}",
    f'" onmouseover="{ACT}',
    f"` onmouseover={ACT} `",
    f"&lt;script&gt;{ACT}&lt;/script&gt;",
    f"&#60;script&#62;{ACT}&#60;/script&#62;",
    f"\\u003cscript\\u003e{ACT}\\u003c/script\\u003e",
    f"<scr\x00ipt>{ACT}</scr\x00ipt>",
    f"<scr\u200bipt>{ACT}</scr\u200bipt>",
    "{{ 7*7 }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ self.__init__.__globals__ }}",
    "$\\input{/etc/passwd}$",
    "$\\frac{1}{",
    "$x^2$ and \\$5",
    "_underscored legend entry",
    "<!--",
    "<![CDATA[",
    "<?xml version='1.0'?>",
    "<!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>&x;",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe",
    "\ud800 lone surrogate",
    "\ufffe\uffff not characters",
    "a" * 5000,
    "",
    "\n\n\n",
    "🦑 漢字 العربية",
]

PAYLOADS = [escape + active for escape in ESCAPES for active in ACTIVE] + PLAIN

ALLOWED_TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "footer",
    "section",
    "article",
    "div",
    "span",
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "ul",
    "li",
    "dl",
    "dt",
    "dd",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "em",
    "abbr",
    "sup",
    "figure",
    "details",
    "summary",
    "i",
    "ins",
    "del",
    "code",
    "svg",
    "defs",
    "g",
    "path",
    "use",
    "text",
    "clippath",
    "rect",
}

ALLOWED_ATTRIBUTES = {
    "lang",
    "charset",
    "http-equiv",
    "content",
    "name",
    "class",
    "aria-label",
    "title",
    "scope",
    "id",
    "style",
    "d",
    "transform",
    "x",
    "y",
    "width",
    "height",
    "viewbox",
    "role",
    "xmlns",
    "xmlns:xlink",
    "version",
    "xlink:href",
    "clip-path",
    "type",
}


def hostile_report(payloads) -> Report:
    """Every payload in every place a report shows text that others wrote."""
    first = payloads[0]
    few = list(dict.fromkeys(payloads))[:24]
    entry = {"value": 0.4, "ci95": [0.3, 0.5], "n": 10}
    return Report(
        kind="simulate",
        protocol={"data": first, "backbone": first, **{f"{payload}": payload for payload in few}},
        metrics={"ranking/mrr": entry, first or "none": entry},
        baselines={"random": {"ranking/mrr": entry}, first or "none": {"ranking/mrr": {**entry, "value": 0.9}}},
        ledger={first: first},
        warnings=list(payloads),
        sections={
            "run": {"command": first, "options": {first: first}, "versions": {first: first}},
            "panels": [
                {
                    "kind": "table",
                    "title": first,
                    "note": first,
                    "columns": ["title", first],
                    "rows": [
                        [payload, {"value": payload, "ci95": None, "n": 1, "marks": first}] for payload in payloads
                    ],
                },
                {
                    "kind": "samples",
                    "title": first,
                    "items": [
                        {"title": payload, "before": payload, "after": f"{payload} and {payload}", "note": payload}
                        for payload in payloads
                    ],
                },
                {"kind": "text", "title": first, "text": "\n\n".join(payloads)},
                {
                    "kind": "intervals",
                    "title": first,
                    "labels": few,
                    "values": [0.5] * len(few),
                    "low": [0.4] * len(few),
                    "high": [0.6] * len(few),
                    "reference": 0.5,
                    "axis": first,
                },
                {
                    "kind": "bars",
                    "title": first,
                    "labels": few,
                    "series": {payload: [0.5] * len(few) for payload in few[:3]},
                    "axis": first,
                },
                {
                    "kind": "lines",
                    "title": first,
                    "x": [1, 2],
                    "series": {payload: [0.1, 0.2] for payload in few[:6]},
                    "x_label": first,
                    "y_label": first,
                },
                {"kind": first, "title": first},
            ],
        },
    )


class Audit(html.parser.HTMLParser):
    """Collects what no page of ours may contain."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.problems = []

    def handle_starttag(self, tag, attributes):
        if tag not in ALLOWED_TAGS:
            self.problems.append(f"<{tag}>")
        for name, value in attributes:
            if name not in ALLOWED_ATTRIBUTES:
                self.problems.append(f"{tag} {name}={value!r}")
            if name == "xlink:href" and not value.startswith("#"):
                self.problems.append(f"{tag} {name}={value!r}")
            if name == "style" and re.search(r"url\((?!#)|expression|@import", value):
                self.problems.append(f"{tag} {name}={value!r}")

    def unknown_decl(self, data):
        self.problems.append(f"declaration {data!r}")


def problems(page: str):
    audit = Audit()
    audit.feed(page)
    audit.close()
    return audit.problems


def test_the_corpus_is_large():
    assert len(set(PAYLOADS)) >= 100


def test_no_payload_becomes_markup_anywhere():
    assert problems(render_html(hostile_report(PAYLOADS))) == []


@pytest.mark.parametrize("start", range(0, len(ACTIVE) * len(ESCAPES), 24))
def test_no_payload_becomes_markup_in_plots_and_headings(start):
    assert problems(render_html(hostile_report(PAYLOADS[start : start + 24]))) == []


@pytest.mark.parametrize("payload", PLAIN, ids=range(len(PLAIN)))
def test_odd_text_is_drawn_as_text(payload):
    page = render_html(hostile_report([payload, "plain"]))
    assert problems(page) == []
    page.encode("utf-8")
    assert "49" not in re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.DOTALL)


def test_the_audit_sees_a_page_that_is_not_escaped():
    page = render_html(hostile_report(["MARK"]))
    assert problems(page.replace("MARK", ACTIVE[2]))
    assert problems(page.replace("MARK", ACTIVE[0]))


def test_the_page_forbids_scripts_and_the_network():
    page = render_html(hostile_report(["x"]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert not re.search(r"(src|href|action)=[\"']?(https?:)?//", page)


def test_terminal_sequences_do_not_reach_the_terminal():
    buffer = io.StringIO()
    Console(file=buffer, width=200, color_system=None).print(summary_table(hostile_report(PLAIN)))
    text = buffer.getvalue()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("dirty", "tidy"),
    [
        ("a\x1b[31mb\x1b[0m", "ab"),
        ("a\x1b]8;;http://evil.invalid\x07b\x1b]8;;\x07", "ab"),
        ("\u202eabc\u202c", "abc"),
        ("zero\u200bwidth", "zerowidth"),
        ("\ud83d", ""),
        ("tab\tnew\nline", "tab\tnew\nline"),
        ("[bold]not markup[/bold]", "[bold]not markup[/bold]"),
        ("naïve 漢字 🦑", "naïve 漢字 🦑"),
    ],
)
def test_clean_keeps_text_and_drops_what_is_not(dirty, tidy):
    assert clean(dirty) == tidy


MALFORMED = {
    "not json": "{",
    "a list": [],
    "no kind": {"metrics": {}},
    "metrics a list": {"kind": "simulate", "metrics": []},
    "metric a number": {"kind": "simulate", "metrics": {"ranking/mrr": 0.3}},
    "metric value text": {"kind": "simulate", "metrics": {"ranking/mrr": {"value": "<b>"}}},
    "baseline a number": {"kind": "simulate", "baselines": {"random": 1}},
    "panel a number": {"kind": "simulate", "panels": [1]},
    "panel without kind": {"kind": "simulate", "panels": [{"title": "x"}]},
    "panel with ragged columns": {
        "kind": "simulate",
        "panels": [{"kind": "intervals", "title": "x", "labels": ["a"], "values": [1, 2], "low": [1], "high": [1]}],
    },
    "panel with text for numbers": {
        "kind": "simulate",
        "panels": [{"kind": "lines", "title": "x", "x": [1], "series": {"a": ["<script>"]}}],
    },
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_report_is_bad_input(tmp_path, name):
    content = MALFORMED[name]
    if isinstance(content, str):
        (tmp_path / "report.json").write_text(content)
    else:
        write_json(tmp_path / "report.json", content)
    with pytest.raises(InputError):
        rebuild(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_report_with_every_payload_is_stored_and_drawn_again(tmp_path):
    shown = hostile_report(PAYLOADS)
    shown.save(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert rebuild(tmp_path).to_json() == shown.to_json()
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page with")
def test_nothing_runs_in_a_real_browser(tmp_path):
    """Even without the page's policy, which is removed here so that escaping alone is tried."""
    page = re.sub(r"<meta http-equiv[^>]*>", "", render_html(hostile_report(PAYLOADS)))
    planted = page.replace("</main>", f"<script>{ACT}</script></main>")
    assert "data-pwned" not in _opening_tag(_dom(tmp_path, page))
    assert "data-pwned" in _opening_tag(_dom(tmp_path, planted))


def _opening_tag(dom: str) -> str:
    return re.search(r"<html[^>]*>", dom).group(0)


def _dom(folder, page: str) -> str:
    (folder / "page.html").write_text(page, encoding="utf-8")
    words = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*words, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout
