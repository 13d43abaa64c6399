"""The report of a run, read as a browser and a Markdown reader read it."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from markdown_it import MarkdownIt

from pl_dendrites import DendriteCallback
from pl_dendrites.report import main, read_history, write_report
from pl_dendrites.reporting.sizes import draw_sizes
from tests.models import Classifier, bits, classifier, quick, same_bits, train

VOID = {"meta", "img", "source", "link", "br"}
UNTIL_ONE_FAILS: dict[str, Any] = {"max_dendrites": 9, "max_tries": 0}
RULES = {"h1", "h2", "p", "li", "dt", "dd", "td", "th", "caption"}


class Page(HTMLParser):
    """Texts by their tag, rows by their table's caption, and all attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if tag in RULES:
            self.texts.append((tag, ""))
        if tag == "tr":
            self.tables[self.of("caption")[-1]].append([])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "caption":
            self.tables[self.of("caption")[-1]] = []
        if tag in ("td", "th"):
            self.tables[self.of("caption")[-1]][-1].append(self.texts[-1][1])

    def handle_data(self, data: str) -> None:
        if RULES & set(self._open):
            self.texts[-1] = (self.texts[-1][0], self.texts[-1][1] + data)

    def of(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A fit with a set that is kept and one that is not, and its directory."""
    directory = tmp_path_factory.mktemp("run")
    dendrites = quick(**UNTIL_ONE_FAILS, dirpath=directory / "best")
    model = classifier(hidden=3)
    train(model, dendrites, default_root_dir=directory, enable_checkpointing=True)
    path = directory / "report.html"
    dendrites.report(path, {"wider": {"score": 0.5, "parameters": 1234}})
    return {"dendrites": dendrites, "model": model, "directory": directory, "path": path, "page": Page(path)}


def number(score: float) -> str:
    return f"{score:.4g}"


def test_the_page_is_complete_in_itself(run: dict[str, Any]) -> None:
    page = run["page"]
    addresses = [value for _, name, value in page.attributes if name in ("src", "srcset", "href", "data")]
    assert len(addresses) == 6
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe"}
    text = run["path"].read_text()
    assert "url(" not in text
    assert "<script" not in text
    assert ("html", "lang", "en") in page.attributes
    assert len(page.of("h1")) == 1
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
    assert ("source", "media", "(prefers-color-scheme: dark)") in page.attributes


def test_what_grew_when_and_where_and_what_became_of_it(run: dict[str, Any]) -> None:
    dendrites, page = run["dendrites"], run["page"]
    head, *rows = page.tables["Sets of dendrites"]
    bases = [r for r in dendrites.history if r["phase"] == "base" and r["cycle"]]
    assert {r["accepted"] for r in bases} == {True, False}
    best = dendrites.history[0]["score"]
    for row, record in zip(rows, bases, strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["verdict"] == ("kept" if record["accepted"] else "rejected")
        assert (cells["to beat"], cells["best"]) == (number(best), number(record["score"]))
        change = abs(record["score"] - best) / best
        assert cells["why"] == f"{'better' if record['score'] < best else 'worse'} by {change:.1%}"
        assert cells["parameters"] == f"{record['parameters']:,}"
        assert cells["epochs"] == f"{4 * record['cycle']} to {4 * record['cycle'] + 2}"
        best = min(best, record["score"])
    head, *rows = page.tables["Layers that can grow"]
    modules = dict(run["model"].named_modules())
    assert [row[0] for row in rows] == ["net.0", "net.4"]
    for name, kind, neurons, count, parameters, more in rows:
        grown = modules[name].dendrites
        assert (kind, int(neurons), int(count)) == ("Linear", modules[name].out_features, grown.count)
        assert int(parameters) == sum(p.numel() for p in grown.parameters())
        assert int(more) == int(neurons) * (modules[name].in_features + 1 + grown.count + 1)
    _, *rows = page.tables["Correlations"]
    sets = [record for record in dendrites.history if record["phase"] == "correlation"]
    for name, *cells in rows:
        found = [record["correlation"][name] for record in sets]
        assert cells == [f"{f['mean']:.3f}, {f['max']:.3f}" for f in found]
    assert len(page.of("li")) == len(dendrites.history)
    assert all(record["reason"] in text for record, text in zip(dendrites.history, page.of("li"), strict=True))


def test_parameters_and_cost_before_and_after(run: dict[str, Any]) -> None:
    _, parameters, inference, base, correlation = run["page"].tables["Cost"]
    assert parameters[1:] == [f"{run['dendrites'].history[0]['parameters']:,}", f"{count(run['model']):,}"]
    k, pool = run["dendrites"].num_dendrites, 2
    assert inference[1:] == ["1.00", f"{1 + k:.2f}"]
    assert base[1:] == ["1.00", f"{(3 + k) / 3:.2f}"]
    assert correlation[1:] == [f"{(2 + 2 * pool) / 3:.2f}", f"{(2 + k + 2 * pool) / 3:.2f}"]


def test_dendrites_that_learn_by_gradient_cost_a_backward_pass_too(run: dict[str, Any]) -> None:
    history = [r | {"learning": "gradient"} for r in run["dendrites"].history if r["phase"] == "base"]
    write_report("report.html", history)
    page = Page(Path("report.html"))
    k = run["dendrites"].num_dendrites
    assert [row[1:] for row in page.tables["Cost"][3:]] == [["1.00", f"{1 + k:.2f}"]]
    assert "Correlations" not in page.tables
    spent = sum(record["epochs"] * (1 + record["dendrites"]) for record in history)
    assert f"cost what {spent} epochs of the plain layers do" in page.of("p")[-1]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_controls_stand_beside_the_grown_network(run: dict[str, Any]) -> None:
    _, grown, wider = run["page"].tables["Grown and plain networks"]
    assert grown[2:4] == [number(run["dendrites"].best_model_score), f"{count(run['model']):,}"]
    assert wider[2:] == ["0.5", "1,234", ""]
    assert wider[1].startswith("worse by" if run["dendrites"].best_model_score > 0.5 else "better by")
    assert "wider, has 0.5" in run["page"].of("p")[0]


@pytest.mark.parametrize("of", ["", "lightning_logs", "best/best.ckpt"])
def test_the_command_reads_a_runs_directory_or_a_checkpoint(
    of: str, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("controls.json").write_text(json.dumps({"wider": {"score": 0.5, "parameters": 1234}}))
    where = run["directory"] / of if (run["directory"] / of).exists() else run["directory"] / "checkpoints"
    main([str(where), "new/report.html", "--controls", "controls.json"])
    page = Page(Path("new/report.html"))
    if of == "best/best.ckpt":  # written in the phase that had the best score, which went on
        assert page.of("li")[-1].endswith("still running when this was written")
        assert page.tables["Cost"] == run["page"].tables["Cost"]
    else:
        assert page.texts == run["page"].texts


def test_a_resumed_run_has_the_report_of_the_whole(run: dict[str, Any]) -> None:
    part = train(classifier(hidden=3), quick(**UNTIL_ONE_FAILS), max_epochs=5, enable_checkpointing=True)
    resumed = quick(**UNTIL_ONE_FAILS)
    resumed.load_state_dict(torch.load(part.checkpoint_callback.best_model_path)["callbacks"]["DendriteCallback"])
    resumed.report("before.html")
    assert Page(Path("before.html")).of("li")[-1].endswith("epochs 4 to 5: still running when this was written")
    resumed = quick(**UNTIL_ONE_FAILS)
    model = classifier(hidden=3)
    train(model, resumed, ckpt_path=part.checkpoint_callback.best_model_path)
    assert same_bits(bits(model), bits(run["model"]))
    resumed.report("after.html", {"wider": {"score": 0.5, "parameters": 1234}})
    assert Page(Path("after.html")).texts == run["page"].texts


class Interrupt(L.Callback):
    def __init__(self, dendrites: DendriteCallback, phase: str) -> None:
        self.dendrites, self.phase = dendrites, phase

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.dendrites.cycle == 1 and self.dendrites.phase == self.phase:
            trainer.save_checkpoint("there.ckpt")
            raise RuntimeError("the power went")


@pytest.mark.parametrize("phase", ["base", "correlation"])
def test_a_run_that_was_interrupted(phase: str) -> None:
    dendrites = quick(min_delta=10.0)
    with pytest.raises(RuntimeError, match="the power went"):
        train(classifier(), dendrites, Interrupt(dendrites, phase))
    dendrites.report("report.html")
    page = Page(Path("report.html"))
    assert page.of("li")[-1].endswith("interrupted by RuntimeError")
    assert "No dendrites were added" in page.of("p")[0]
    assert [row[1] for row in page.tables.get("Sets of dendrites", [])[1:]] == ["rejected"] * (phase == "base")
    main(["there.ckpt", "there.html"])
    page = Page(Path("there.html"))
    assert "still running" in page.of("p")[0]
    assert [row[1] for row in page.tables.get("Sets of dendrites", [])[1:]] == ["on trial"] * (phase == "base")


def test_a_run_without_dendrites(tmp_path: Path) -> None:
    dendrites = quick(max_dendrites=0, base_epochs=1)
    train(classifier(), dendrites)
    dendrites.report(str(tmp_path / "report.html"))
    page = Page(tmp_path / "report.html")
    assert page.of("p")[0].startswith("No dendrites were added: no set was tried. Growth ended: 1 epochs are over")
    assert "No control was given" in page.of("p")[1]
    assert "Sets of dendrites" not in page.tables
    assert [row[1:] for row in page.tables["Cost"][2:]] == [["1.00", "1.00"]] * 2


def test_layers_left_alone_with_the_reason() -> None:
    model = classifier()
    model.net[0].requires_grad_(False)
    dendrites = quick(max_dendrites=0, base_epochs=1)
    train(model, dendrites)
    dendrites.report("report.html")
    assert Page(Path("report.html")).of("li")[0] == (
        "net.0: its parameters are frozen: name it in `targets` to let it grow"
    )


def strange(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Names and reasons that mean something to a browser or to a Markdown reader."""
    text = "<script>a && b</script> | `x` *y* [z](w) $1^2$"
    return [
        {
            **record,
            "monitor": text,
            "reason": text,
            "skipped": {text: text},
            "layers": {text if name == "net.0" else name: layer for name, layer in record["layers"].items()},
            "correlation": {text if name == "net.0" else name: c for name, c in record["correlation"].items()},
        }
        for record in run["dendrites"].history
    ]


def test_what_users_wrote_is_shown_as_they_wrote_it(run: dict[str, Any]) -> None:
    history = strange(run)
    text = history[0]["monitor"]
    write_report("report.html", history, {text: {"score": 1}})
    page = Page(Path("report.html"))
    assert page.tables["Layers that can grow"][1][0] == page.tables["Correlations"][1][0] == text
    assert page.tables["Grown and plain networks"][2][0] == text
    assert f"{text}: {text}" in page.of("li")
    assert not [tag for tag, _, _ in page.attributes if tag == "script"]


def test_markdown_has_its_pictures_beside_it(run: dict[str, Any]) -> None:
    history = strange(run)
    write_report("report.html", history)
    write_report("out put/run 1.md", history)
    tokens = MarkdownIt("commonmark").enable("table").parse(Path("out put/run 1.md").read_text())
    inside = [child for token in tokens for child in token.children or []]
    pictures = [child.attrs["src"] for child in inside if child.type == "image"]
    assert pictures == ["run%201-growth.png", "run%201-sizes.png", "run%201-correlations.png"]
    assert all(Path("out put", name.replace("%20", " ")).read_bytes()[1:4] == b"PNG" for name in pictures)
    assert not [child for child in inside if child.type in ("html_inline", "link_open", "em_open")]
    cells = [i for i, token in enumerate(tokens) if token.type in ("th_open", "td_open")]
    shown = ["".join(child.content for child in tokens[i + 1].children) for i in cells]
    page = Page(Path("report.html"))
    assert shown == [cell for table in page.tables.values() for row in table for cell in row]
    items = [tokens[i + 2] for i, token in enumerate(tokens) if token.type == "list_item_open"]
    assert ["".join(child.content for child in item.children) for item in items][-len(page.of("li")) :] == page.of("li")


def test_a_state_of_before_there_were_reports(run: dict[str, Any]) -> None:
    state = {k: v for k, v in run["dendrites"].state_dict().items() if k != "running"}
    new = ("candidates", "layers", "skipped", "monitor", "mode", "learning")
    state["history"] = [{k: v for k, v in record.items() if k not in new} for record in state["history"]]
    old = quick()
    old.load_state_dict(state)
    old.report("report.html")
    page = Page(Path("report.html"))
    assert [row[:2] for row in page.tables["Sets of dendrites"]] == [
        row[:2] for row in run["page"].tables["Sets of dendrites"]
    ]
    assert [row[0] for row in page.tables["Correlations"][1:]] == ["net.0", "net.4"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"path": "report.pdf"}, r"`path` must be a file that ends in .html or .md, got 'report.pdf'"),
        ({"controls": {"a": 0.5}}, r"`controls\['a'\]` must be a dict with 'score' .*, got 0.5"),
        ({"controls": {"a": {"loss": 1}}}, r"`controls\['a'\]` must be a dict with 'score' .*, got {'loss': 1}"),
        ({"controls": {"a": {"score": "x"}}}, r"`controls\['a'\]\['score'\]` must be a number .*, got 'x'"),
    ],
)
def test_a_refusal_says_what_is_wrong(arguments: dict[str, Any], says: str, run: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=says):
        run["dendrites"].report(**{"path": "report.html", **arguments})
    with pytest.raises(ValueError, match="there is nothing to report: no fit has begun"):
        quick().report("report.html")
    assert list(Path().iterdir()) == []


def test_a_directory_without_a_history(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"no history of growth in .*\s.*there is no file that ends in .ckpt"):
        read_history(Path())
    train(classifier(), enable_checkpointing=True, max_epochs=1)
    with pytest.raises(ValueError, match=r"no history of growth in .*\s.*has no state of a DendriteCallback"):
        read_history(Path())
    with pytest.raises(SystemExit):
        main([".", "report.html"])
    assert "no history of growth in" in capsys.readouterr().err
    Path("broken.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"'broken\.ckpt' cannot be read as a checkpoint"):
        read_history("broken.ckpt")


def test_without_matplotlib_it_says_what_to_install(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        run["dendrites"].report("report.html")


# -- what sparse dendrites and those of some neurons cost ---------------------------------------------------------


class Wide(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2))


def products(module: torch.nn.Module) -> int:
    """Multiplications of one sample, counted by running it."""
    counted = 0

    def count_them(layer: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
        nonlocal counted
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            counted += weight.numel()

    hooks = [m.register_forward_hook(count_them) for m in module.modules()]
    module(torch.randn(1, 4))
    for hook in hooks:
        hook.remove()
    return counted


@pytest.mark.parametrize("settings", [{"fan_in": 2}, {"share": 0.25}, {"fan_in": 0.5, "share": 0.5}, {}], ids=str)
def test_costs_are_those_of_what_was_grown(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, dendrites = Wide(), quick(max_dendrites=1, max_correlation_epochs=4, candidates=3, **settings)
    model.optimizers_of = lambda model: torch.optim.Adam(model.parameters(), lr=0.003)
    plain = products(model.net)
    train(model, dendrites)
    assert dendrites.num_dendrites == 1
    grown = products(model.net) / plain
    assert grown == 2 if not settings else 1 < grown < 1.7
    dendrites.report("cost.html")
    _, _, inference, base, correlation = Page(Path("cost.html")).tables["Cost"]
    assert inference[1:] == ["1.00", f"{grown:.2f}"]
    assert base[1:] == ["1.00", f"{(2 + grown) / 3:.2f}"]
    phase = dendrites.history[1]
    # Candidates of all neurons learn, with all inputs in the first two of the four epochs if they are to be sparse.
    fan_in = {2: 2 * 14, 0.5: 2 * 12 + 6 * 2}.get(settings.get("fan_in"), plain)
    pool = 3 * (plain + fan_in) / 2 / plain
    assert phase["step_cost"] == pytest.approx((2 + 2 * pool) / 3)
    assert correlation[1:] == [f"{(2 + 2 * pool) / 3:.2f}", f"{(1 + grown + 2 * pool) / 3:.2f}"]
    spent = 4 * phase["step_cost"] + 2 + 2 * (2 + grown) / 3
    assert f"cost what {spent:.0f} epochs of the plain layers do" in Page(Path("cost.html")).of("p")[-1]


# -- a fit that ended in a correlation phase ----------------------------------------------------------------------


def test_a_fit_that_goes_on_counts_no_set_twice_and_none_that_never_was(tmp_path: Path) -> None:
    for epochs, tried in ((3, 0), (6, 1)):  # ends in the first correlation phase, and in the first base phase after
        dendrites = quick(max_tries=0)
        train(classifier(), dendrites, max_epochs=epochs).save_checkpoint(tmp_path / "a.ckpt")
        accepted = [record["accepted"] for record in dendrites.history]
        assert accepted == ([None, None] if epochs == 3 else [None, None, True])
        again, model = quick(max_tries=0), classifier()
        train(model, again, ckpt_path=tmp_path / "a.ckpt", max_epochs=epochs + 2)
        assert [record["accepted"] for record in again.history] == [*accepted, None]
        again.report(tmp_path / "a.md")
        sets = "No dendrites were added" if not tried else "with 1 dendrite per neuron"
        assert sets in (tmp_path / "a.md").read_text()
        assert f"{tried} of {tried}" in (tmp_path / "a.md").read_text()


def test_sizes_beside_plain_networks(run: dict[str, Any]) -> None:
    head, *rows = run["page"].tables["Sizes"]
    bases = [record for record in run["dendrites"].history if record["phase"] == "base"]
    assert head[:2] == ["parameters", "best val_loss"]
    expected = {r["parameters"]: min(b["score"] for b in bases if b["parameters"] == r["parameters"]) for r in bases}
    assert [row[:2] for row in rows] == [[f"{size:,}", number(score)] for size, score in sorted(expected.items())]
    kept = [size["parameters"] for size in run["dendrites"].frontier]
    assert set(kept) < set(expected)


@pytest.mark.parametrize(("mode", "front"), [("min", [(10, 0.5), (40, 0.3)]), ("max", [(10, 0.5), (20, 0.6)])])
def test_the_line_joins_what_no_smaller_network_is_as_good_as(mode: Any, front: list[Any]) -> None:
    found = [(10, 0.5), (20, 0.6), (20, 0.55), (40, 0.3)]
    best = min if mode == "min" else max
    history = [
        {"phase": "base", "parameters": size, "score": score, "best_score": best(s for _, s in found)}
        for size, score in found
    ]
    controls = {"wider": {"score": 0.4, "parameters": 30}, "unknown": {"score": 0.2}}
    (axes,) = draw_sizes(history, "score", mode, controls=controls).axes
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
    assert lines["grown"] == front
    assert lines["what the fit leaves"] == front[-1:]
    assert lines["control"] == [(30, 0.4)]
    assert [text.get_text() for text in axes.texts] == ["wider"]
