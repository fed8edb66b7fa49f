"""The HTML page: one file, small, everything of the model as text; in a browser it shows what the JSON says."""

import html
import json
import re
from html.parser import HTMLParser

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lqcompile
from lqcompile import viewer
from lqcompile.errors import Reason
from lqcompile.types import Candidate, NearMiss, Piece, Step

from . import browser
from .models import Dequant
from .test_report import HOSTILE, done, kept

ARROW_DOWN, ENTER = 40, 13
NEEDS_BROWSER = pytest.mark.skipif(browser.binary() is None, reason="no Chromium on this machine")


class Block(nn.Module):
    """Eight matmuls: five packed ones, attention's two, and one whose scale depends on the input."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up = (Dequant(32, 32, 16, seed=5 * seed + i) for i in range(5))
        self.register_buffer("codes", torch.randint(-8, 8, (32, 32), dtype=torch.int8))

    def forward(self, x):
        x = x + self.o((self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x))
        return x + F.linear(self.up(x), self.codes.to(x.dtype) * x.abs().amax())


@pytest.fixture(scope="module")
def report():
    """Of 200 matmuls."""
    model = nn.Sequential(*(Block(i) for i in range(25))).eval()
    with torch.no_grad():
        found = lqcompile.explain(model, torch.randn(1, 3, 32))
    assert len(found.decisions) == 200 and found.rewritten == 125
    return found


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.html(path)
    return path


class Outline(HTMLParser):
    """Tags, what they ask for, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        self.addresses += [named[name] for name in ("src", "href", "action", "data", "srcset") if name in named]
        self.ids += [named["id"]] if "id" in named else []
        assert not [name for name in named if name.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)


def test_one_file_that_asks_for_nothing_and_is_small(report, page):
    text = page.read_text()
    outline = Outline(text)
    assert outline.addresses == ["#chosen"] and not {"link", "img", "iframe", "object", "base"} & set(outline.tags)
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert len(text.encode()) <= 500_000
    assert len(set(outline.ids)) == len(outline.ids)
    assert report.html() == text


def test_the_page_says_what_the_report_says(report, page):
    words = html.unescape(" ".join(Outline(page.read_text()).words))
    for d in report.document()["decisions"]:
        assert d["id"] in words
    assert " ".join(report.verdict().split()) in " ".join(words.split()) and report.next_step() in words


def hostile(name):
    step = Step(f"call({name})", name, (), "weight", "stopped", name, name)
    after = Step(name, name, (), "matmul", "understood", name, name)
    m = sympy.Symbol("m", positive=True)
    more = {"candidates": (Candidate(name, name, 1e-6 * m),), "dense": Candidate(name, "", 2e-6 * m), "light": 1e-7}
    near = (NearMiss(name, Reason.GROUPS, name),)
    pieces = (Piece(1, None, name, 1e-6),)
    first = done(name, pieces, before=(step, after), after=(after,), advice=name, **more)
    return lqcompile.Report({"name": name}, (first, kept(name, Reason.GROUPS, near, file=name)), (), (name,), (name,))


ESCAPES = [
    "<script>document.title='x'</script>",
    "</script><b>",
    "<!--",
    "]]>",
    "&lt;b&gt;",
    "{{ 7*7 }}",
    "a.b.c" * 2000,
]


@given(st.one_of(st.sampled_from([*HOSTILE, *ESCAPES]), st.text(max_size=200)))
def test_names_are_shown_as_text(name):
    plain = Outline(hostile("plain").html())
    text = hostile(name).html()
    text.encode("utf-8")
    outline = Outline(text)
    # No tag that a harmless name does not have; of those that a name could forge, as many.
    assert set(outline.tags) <= set(plain.tags)
    for tag in ("script", "style", "template", "button", "h1", "h2", "p", "b", "svg", "title", "td"):
        assert outline.tags.count(tag) == plain.tags.count(tag), tag
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert {d["file"] for d in json.loads(data[1])["decisions"]} == {name, "/home/me/model.py"}


def test_a_name_of_10000_characters_is_there_whole():
    name = "x" * 10_000
    assert name in hostile(name).html()


def test_an_empty_report_has_a_page():
    assert "no matmul was compiled" in lqcompile.Report({}, ()).html()


def test_boxes_do_not_overlap_and_lines_go_down():
    steps = [{"text": f"s{i}", "value": "", "role": "constant", "inputs": [j for j in range(i) if i % (j + 1) == 0]}
             for i in range(24)]  # fmt: skip
    drawn = viewer.drawing(steps)
    places = [(b["x"], b["y"]) for b in drawn["boxes"]]
    for i, (x, y) in enumerate(places):
        assert 0 <= x <= drawn["width"] - viewer.WIDE and 0 <= y <= drawn["height"] - viewer.HIGH
        assert all(y != other or abs(x - left) >= viewer.WIDE for left, other in places[:i])
    assert all(places[j][1] < places[i][1] for i, step in enumerate(steps) for j in step["inputs"])


def test_the_tree_has_every_matmul_once_in_its_module(report):
    decisions = report.document()["decisions"]

    def leaves(branch):
        for inner in branch.branches.values():
            yield from leaves(inner)
        yield from ((branch.path, name, i) for name, i in branch.leaves)

    root = viewer.tree(decisions)
    found = list(leaves(root))
    assert sorted(i for *_, i in found) == list(range(200)) and not root.leaves
    assert all(decisions[i]["id"].startswith(path) for path, _, i in found)
    assert (root.total, root.rewritten) == (200, 125)
    assert (root.branches["7"].total, root.branches["7"].rewritten) == (8, 5)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    found = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def facts(chromium):
    pairs = "[...document.querySelectorAll('#facts dt')].map(t => [t.textContent, t.nextSibling.textContent])"
    return dict(chromium.run(pairs))


@NEEDS_BROWSER
def test_the_browser_shows_what_the_json_says(report, page, chromium):
    document = report.document()
    chromium.open(page)
    assert chromium.run("document.querySelectorAll('#tree button').length") == 200
    # It opens on what needs the user.
    first = next(d for d in document["decisions"] if d["near_misses"])
    assert chromium.run("document.getElementById('name').textContent") == first["id"]
    assert facts(chromium)["what to change"] == first["advice"]

    # By keyboard alone: filter, go into the tree, choose.
    chromium.run("document.getElementById('filter').focus()")
    chromium.write("7.up")
    wanted = [d for d in document["decisions"] if "7.up" in d["id"]]
    assert chromium.run("document.getElementById('count').textContent") == f"{len(wanted)} of 200 matmuls"
    visible = "[...document.querySelectorAll('#tree button')].filter(b => b.offsetParent !== null)"
    assert chromium.run(f"{visible}.length") == len(wanted) >= 2
    chromium.run(f"{visible}[0].focus()")
    chromium.press("ArrowDown", ARROW_DOWN)
    chromium.press("Enter", ENTER)
    d = wanted[1]
    assert chromium.run("document.getElementById('name').textContent") == d["id"]
    said = facts(chromium)
    f = d["format"]
    assert said["rule"] == d["rule"] and said["proof"] == d["proof"] and said["layout"] == d["layout"]
    assert said["format"].startswith(d["formula"]) and f"groups of {f['group']}" in said["format"]
    assert said["source"].startswith(f"{d['file']}:{d['line']}") and d["code"] in said["source"]
    assert said["predicted"].startswith(f"{d['predicted']['speedup']}x at M = {d['predicted']['m']}")
    assert f"n {d['problem']['n']}, k {d['problem']['k']}" in said["y[m, n] = x[m, k] @ w[n, k].T"]

    # Through the passes.
    names = []
    for i in range(4):
        names.append(chromium.run("document.getElementById('place').textContent"))
        told = chromium.run("document.getElementById('pass').textContent")
        if i == 1:
            assert all(p["when"] in told and p["kernel"] in told for p in d["pieces"])
        if i == 2:
            structure = document["structures"][d["structure"]]
            gone = [s["text"] for s in structure["before"] if s.get("gone")]
            removed = chromium.run("[...document.querySelectorAll('#pass del')].map(e => e.textContent)")
            assert len(removed) == len(gone) and all(g in r for g, r in zip(gone, removed, strict=True))
            assert chromium.run("document.querySelectorAll('#pass ins').length") >= 2
        chromium.run("document.getElementById('next').click()")
    assert names == [f"Step {i} of 4: {n}" for i, n in enumerate(("recognise", "plan", "lower", "verify"), 1)]
    assert chromium.run("document.getElementById('next').disabled") is True

    # The pictures are those of this matmul.
    boxes = chromium.run("[...document.querySelectorAll('#graphs figure')].map(f => f.querySelectorAll('.box').length)")
    structure = document["structures"][d["structure"]]
    assert boxes == [len(structure["before"]), len(structure["after"])]
    assert chromium.run("document.querySelectorAll('#curve polyline').length") == len(
        document["curves"][d["curve"]]["lines"]
    )
    assert chromium.errors == []
    assert set(chromium.requests) == {page.as_uri()}


@NEEDS_BROWSER
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_follows_the_colours_of_the_system(page, chromium, width, dark, tmp_path):
    chromium.open(page, width, dark)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    back = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 200) == dark
    assert chromium.picture(tmp_path / "page.png").startswith(b"\x89PNG")


def surrogates(text):
    """Halves of surrogate pairs do not travel: as question marks."""
    return re.sub("[\ud800-\udfff\ufffd]", "?", text)


@NEEDS_BROWSER
def test_hostile_names_run_nothing_in_the_browser(chromium, tmp_path):
    for i, name in enumerate([*HOSTILE, *ESCAPES]):
        path = tmp_path / f"{i}.html"
        report = hostile(name)
        report.html(path)
        chromium.open(path, 390)
        chosen = next(d for d in report.document()["decisions"] if d["outcome"] == "kept")
        for element, text in (("name", chosen["id"]), ("facts", chosen["near_misses"][0]["at"])):
            shown = chromium.run(f"document.getElementById('{element}').textContent")
            assert surrogates(text) in surrogates(shown)
        assert chromium.run("document.title") != "x" and chromium.run("document.querySelectorAll('b b').length") == 0
        assert chromium.run("document.documentElement.scrollWidth") <= 390
    assert chromium.errors == []
