"""What a notebook shows of what users look at, read as its page reads it."""

from __future__ import annotations

import copy
import html
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pl_dendrites import select_targets
from pl_dendrites.comparison import Comparison
from pl_dendrites.core import Soma
from pl_dendrites.reporting.page import Paragraph, Picture, to_html
from pl_dendrites.reporting.tables import summary_table
from pl_dendrites.trials import Run
from tests.models import Classifier, quick, train

ROOT = Path(__file__).parents[1]
LAYER, METRIC = "<b>fc&amp;</b>", "<script>loss</script>"
TAGS = {"style", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "code"}
PLAIN = (str, int, float, bool, type(None))
NESTED = {"scores", "correlation", "layers", "skipped"}


class Strange(Classifier):
    """Its names mean something to a browser."""

    def __init__(self) -> None:
        super().__init__()
        first, *rest = self.net
        self.net = nn.Sequential()
        for name, layer in zip((LAYER, "norm", "relu", "dropout", "head"), (first, *rest), strict=True):
            self.net.add_module(name, layer)
        self.unused = nn.Linear(4, 4).requires_grad_(False)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log(METRIC, nn.functional.cross_entropy(self(batch[0]), batch[1]))


class Tables(HTMLParser):
    """The rows of each table, all tags and attributes, and what is outside the root."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.css, self._open = "", list[str]()
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert self._open or (tag, attrs) in [("style", []), ("div", [("class", "pl-dendrites")])]
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)
        if tag == "table":
            self.rows.append([])
        elif tag == "tr":
            self.rows[-1].append([])
        elif tag in ("th", "td"):
            self.rows[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.css += data
        elif {"th", "td"} & set(self._open):
            self.rows[-1][-1][-1] += data


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    torch.manual_seed(0)
    model, dendrites = Strange(), quick(METRIC)
    train(model, dendrites)
    return {"model": model, "dendrites": dendrites}


def compared() -> Comparison:
    results = {("plain", 0): 0.5, ("plain", 1): 0.7, ("grown <a>", 0): 0.25}
    runs = [Run(name, seed, result, 0.3, 1234, 7, 1.5, 0, 0, 4936) for (name, seed), result in results.items()]
    return Comparison(METRIC, tuple(runs))


SHOWN = {
    "summary": lambda run: run["dendrites"].summary(),
    "history": lambda run: run["dendrites"].history,
    "frontier": lambda run: run["dendrites"].frontier,
    "network": lambda run: run["dendrites"].network,
    "selection": lambda run: select_targets(run["model"]),
    "comparison": lambda run: compared(),
}


def foreign_rules(css: str) -> list[str]:
    """The selectors of a style sheet that apply to more than what is inside our roots."""
    preludes = re.findall(r"[^{}]+(?=\{)", re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL))
    selectors = [one.strip() for text in preludes if not text.strip().startswith("@") for one in text.split(",")]
    assert len(selectors) > 5
    inside = re.compile(r"\.pl-dendrites(-report)?( [^+~]+)?")  # no + and ~, which mean what stands beside a root
    return [selector for selector in selectors if not inside.fullmatch(selector)]


@pytest.mark.parametrize("name", SHOWN)
def test_a_table_means_what_users_wrote_and_changes_nothing_around_it(name: str, run: dict[str, Any]) -> None:
    shown = Tables(SHOWN[name](run)._repr_html_())
    assert set(shown.tags) <= TAGS
    assert {key for key, _ in shown.attributes} <= {"class", "role", "aria-label", "tabindex", "scope"}
    assert not foreign_rules(shown.css)
    assert not re.search(r"url|@import|color: *#|background", shown.css)
    cells = " ".join(cell for table in shown.rows for row in table for cell in row)
    expected = {
        "summary": f"best {METRIC}",
        "network": f"net.{LAYER}",
        "selection": f"net.{LAYER}",
        "comparison": METRIC,
    }
    assert expected.get(name, "") in cells
    assert all(len(row) == len(table[0]) for table in shown.rows for row in table)


def test_a_table_says_what_is_printed(run: dict[str, Any]) -> None:
    def words(rows: list[list[str]]) -> list[str]:
        return " ".join(cell for row in rows for cell in row).split()

    def printed(value: object) -> list[str]:
        return str(value).split()

    dendrites = run["dendrites"]
    shown = {name: Tables(make(run)._repr_html_()).rows for name, make in SHOWN.items()}
    summary = [word for word in printed(dendrites.summary()) if set(word) != {"-"}]
    assert sorted(words(shown["summary"][0])) == sorted(summary)  # reasons go on in the next line there
    assert words(shown["network"][0]) == printed(dendrites.network)
    assert [int(row[3]) for row in shown["network"][0][1:]] == [dendrites.num_dendrites] * 2 != [0, 0]
    assert int(shown["network"][0][1][4]) == sum(
        p.numel() for name, p in run["model"].named_parameters() if f"{LAYER}.dendrites" in name
    )
    targets, alone = shown["selection"]
    lines = str(select_targets(run["model"])).splitlines()
    assert words(targets) == " ".join(lines[: len(targets)]).split()
    assert [f"'{name}' is left alone: {reason}" for name, reason in alone[1:]] == lines[len(targets) :]
    head, *rows = shown["history"][0]
    assert [row[head.index("phase")] for row in rows] == [record["phase"] for record in dendrites.history]
    verdicts = {None: "", True: "yes", False: "no"}
    assert [row[head.index("accepted")] for row in rows] == [verdicts[r["accepted"]] for r in dendrites.history]
    assert [row[:2] for row in shown["frontier"][0][1:]] == [
        [f"{size['parameters']:,}", f"{size['score']:.4g}"] for size in dendrites.frontier
    ]
    assert shown["comparison"][0] == [
        ["network", METRIC, "parameters", "bytes", "epochs", "seconds", "seeds"],
        ["plain", "0.6 ± 0.14", "1,234", "4,936", "7", "1.5", "2"],
        ["grown <a>", "0.25", "1,234", "4,936", "7", "1.5", "1"],
    ]


def test_a_summary_is_text_and_a_history_a_list(run: dict[str, Any]) -> None:
    dendrites = run["dendrites"]
    summary, history = dendrites.summary(), dendrites.history
    assert isinstance(summary, str)
    assert summary == summary_table(history)
    assert isinstance(history, list)
    assert history is dendrites.history
    for copied in (pickle.loads(pickle.dumps((summary, history))), copy.deepcopy((summary, history))):
        assert copied == (summary, history)
    assert type(dendrites.state_dict()["history"]) is list  # checkpoints hold plain values
    assert not hasattr(quick().summary(), "_repr_html_")  # no fit, no table


def documented() -> set[str]:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    section = page.partition("## The history")[2].partition("\n## ")[0]
    return {key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}


@pytest.fixture(scope="module")
def histories(run: dict[str, Any]) -> list[list[dict[str, Any]]]:
    torch.manual_seed(0)
    model, shared = Classifier(), quick(form=None, max_dendrites=1)
    model.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    train(model, shared)
    model, soma = Classifier(), quick(form="shared", max_dendrites=1)
    model.net = Soma(4, 2)
    train(model, soma)
    return [run["dendrites"].history, shared.history, soma.history]


def test_the_keys_of_a_history_are_documented_and_hold_one_kind_of_value(histories: list[Any]) -> None:
    assert {key for history in histories for record in history for key in record} == documented()
    for record in (record for history in histories for record in history):
        assert all(isinstance(value, PLAIN) for key, value in record.items() if key not in NESTED)
        assert isinstance(record["scores"], list)
        assert all(isinstance(record[key], dict) for key in NESTED - {"scores"})


@pytest.mark.long
def test_pandas_makes_columns_of_a_history(histories: list[Any]) -> None:
    pandas = pytest.importorskip("pandas")
    for history in histories:
        frame = pandas.DataFrame(history)
        assert len(frame) == len(history)
        numbers = {"cycle", "dendrites", "units", "parameters", "epochs", "score", "best_score", "candidates"}
        for column in numbers & set(frame):
            assert pandas.api.types.is_numeric_dtype(frame[column]), column
        scores = [score for record in history for score in record["scores"] or [None]]
        assert frame.explode("scores")["scores"].astype(float).fillna(-1).tolist() == [
            -1 if score is None else score for score in scores
        ]
        assert not {"layers", "correlation"} & set(pandas.json_normalize(history))


# -- the report ---------------------------------------------------------------------------------------------------


def test_the_styles_of_a_report_are_for_the_report_alone() -> None:
    page = to_html("A report", [Paragraph("It grew.")])
    (css,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert not foreign_rules(css)
    assert page.count('class="pl-dendrites-report"') == 1
    # What is put into another page loses its html and body, and their styles with them. A meta would stay.
    assert set(re.findall(r'<(\w+)[^>]*? style="', page)) == {"html", "body"}
    assert re.findall(r'<meta name="([^"]+)"', page) == ["viewport"]


def test_a_notebook_shows_a_report_in_a_frame(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pl_dendrites.reporting.page._drawn", lambda figure, kind: b"")  # pictures take long
    report = run["dendrites"].report("report.html")
    shown = report._repr_html_()
    frame = re.fullmatch(r'<iframe title="[\w ]+" srcdoc="([^"]*)" style="[\w :;%]+"></iframe>', shown)
    assert frame is not None
    assert html.unescape(frame[1]) == Path("report.html").read_text(encoding="utf-8")
    assert str(report) == repr(report) == "Growth of dendrites: report.html"
    before = list(Path().iterdir())
    unwritten = run["dendrites"].report()
    assert unwritten._repr_html_() == shown
    assert list(Path().iterdir()) == before


def test_the_same_run_gives_the_same_picture() -> None:
    def draw(theme: Any) -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.add_axes((0, 0, 1, 1)).plot([1, 2], "o")
        return figure

    one, other = (to_html("A", [Picture("a", "a point", draw)]) for _ in range(2))
    assert one == other
