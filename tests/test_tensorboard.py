"""What TensorBoard finds in a run's directory, and what other loggers are given."""

from __future__ import annotations

import io
import re
import sys
import warnings
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams

from pl_dendrites.reporting.figures import draw_growth
from tests.models import classifier, quick, train

pytestmark = pytest.mark.versions

LAYERS = ["net.0", "net.4"]


def read(directory: str | Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()


def texts(events: EventAccumulator) -> list[tuple[int, str]]:
    found = events.Tensors("dendrites/decisions/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Five phases: a set that is kept and, as no gain is enough for the second one, a set that is not."""
    logger = TensorBoardLogger(tmp_path_factory.mktemp("logs"))
    dendrites, model = quick(base_epochs=3, max_tries=0, candidates=3, targets=["net.[014]"]), classifier()

    class Demand(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            dendrites._fit.machine._min_delta = 10.0 if dendrites.cycle == 2 else 0.0

    train(model, Demand(), dendrites, logger=logger)
    assert [record["accepted"] for record in dendrites.history] == [None, None, True, None, False]
    return {"events": read(logger.log_dir), "dendrites": dendrites, "history": dendrites.history, "model": model}


def ends(history: list[dict[str, Any]]) -> list[int]:
    """Steps at which phases ended; an epoch has four."""
    return [4 * sum(record["epochs"] for record in history[: i + 1]) - 1 for i in range(len(history))]


# -- TensorBoard --------------------------------------------------------------------------------------------------


def test_scalars_agree_with_the_history(run: dict[str, Any]) -> None:
    values = {tag: {e.step: e.value for e in run["events"].Scalars(tag)} for tag in run["events"].Tags()["scalars"]}
    for step, record in zip(ends(run["history"]), run["history"], strict=True):
        assert values["dendrites/phase"][step] == (record["phase"] == "correlation")
        for key in ("cycle", "parameters", "best_score"):
            assert values[f"dendrites/{key}"][step] == pytest.approx(record[key])
        assert values["dendrites/count"][step] == record["dendrites"]
        for name, figures in record["correlation"].items():
            for kind, value in figures.items():
                assert values[f"dendrites/correlation_{kind}/{name}"][step] == pytest.approx(value)


def test_a_figure_after_each_phase(run: dict[str, Any]) -> None:
    assert run["events"].Tags()["images"] == ["dendrites/growth"]
    figures = run["events"].Images("dendrites/growth")
    assert [figure.step for figure in figures] == ends(run["history"])
    pictures = [np.asarray(Image.open(io.BytesIO(figure.encoded_image_string))) for figure in figures]
    assert all(picture.shape == (690, 960, 3) for picture in pictures)
    assert all((one != other).any() for one, other in pairwise(pictures))


def test_a_text_after_each_phase_with_the_reason_of_every_decision(run: dict[str, Any]) -> None:
    found = texts(run["events"])
    assert [step for step, _ in found] == ends(run["history"])
    for number, (_, text) in enumerate(found, 1):
        finished = run["history"][:number]
        decisions = [line for line in text.splitlines() if line.startswith("1. ")]
        assert len(decisions) == number
        for line, record in zip(decisions, finished, strict=True):
            assert line.startswith(f"1. **{record['phase']} phase of cycle {record['cycle']}** ")
            assert line.endswith(f": {record['reason']}")
        assert f"Best val_loss so far: {finished[-1]['best_score']:.4g}" in text
        assert "* `net.1`: it has no weight matrix" in text
        assert "No figures" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[-1] for row in rows] == [" |", "yes |", "no |"]


def test_a_histogram_of_correlations_for_every_layer_and_correlation_epoch(run: dict[str, Any]) -> None:
    events = run["events"]
    assert set(events.Tags()["histograms"]) == {f"dendrites/correlation/{name}" for name in LAYERS}
    for name, neurons in zip(LAYERS, (6, 2), strict=True):
        found = events.Histograms(f"dendrites/correlation/{name}")
        largest = events.Scalars(f"dendrites/correlation_max/{name}")
        assert [event.step for event in found] == [event.step for event in largest]
        assert len(found) == 4
        for event, scalar in zip(found, largest, strict=True):
            assert event.histogram_value.num == neurons
            assert event.histogram_value.max == pytest.approx(scalar.value)


def test_the_layout_finds_the_scalars(run: dict[str, Any]) -> None:
    (content,) = run["events"].Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(content.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["dendrites"]
    shown = set()
    for chart in layout.category[0].chart:
        for pattern in chart.multiline.tag:
            matched = {tag for tag in run["events"].Tags()["scalars"] if re.match(pattern, tag)}
            assert matched, pattern
            shown |= matched
    assert {"val_loss", "dendrites/best_score", "dendrites/phase", "dendrites/count"} <= shown
    assert {f"dendrites/correlation_{kind}/{name}" for kind in ("mean", "max") for name in LAYERS} <= shown
    assert "val_acc" not in shown


def recorded(events: EventAccumulator) -> tuple[dict[str, Any], list[str]]:
    """Hyperparameters and results as TensorBoard's page of them shows: of each, the first record counts."""
    content = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}
    start = hparams.parse_session_start_info_plugin_data(content[hparams.SESSION_START_INFO_TAG])
    experiment = hparams.parse_experiment_plugin_data(content[hparams.EXPERIMENT_TAG])
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    return values, [info.name.tag for info in experiment.metric_infos]


def test_hyperparameters_of_model_and_growth_with_the_final_results(run: dict[str, Any]) -> None:
    parameters, results = recorded(run["events"])
    assert parameters["hidden"] == 6
    assert parameters["dendrites/monitor"] == "val_loss"
    assert parameters["dendrites/candidates"] == 3
    assert parameters["dendrites/max_dendrites"] == 2
    assert "dendrites/activation" not in parameters  # as by default
    assert results == ["dendrites/best_score", "dendrites/count", "dendrites/parameters", "hp_metric"]
    last = {name: run["events"].Scalars(name)[-1].value for name in results}
    assert last["dendrites/best_score"] == pytest.approx(run["dendrites"].best_model_score)
    assert last["dendrites/count"] == run["dendrites"].num_dendrites == 1
    assert last["dendrites/parameters"] == sum(p.numel() for p in run["model"].parameters())


@pytest.mark.parametrize("own", [True, False])
def test_a_users_own_page_of_hyperparameters_comes_first(own: bool, tmp_path: Path) -> None:
    class Own(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            if own:
                trainer.logger.log_hyperparams({"mine": 1.0}, {"val_acc": 0.0})

    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    train(classifier(), Own(), quick(max_dendrites=0, base_epochs=1), logger=logger)
    parameters, results = recorded(read(logger.log_dir))
    assert results == (["val_acc"] if own else ["dendrites/best_score", "dendrites/count", "dendrites/parameters"])
    assert ("mine" in parameters) is own
    assert "dendrites" not in (Path(logger.log_dir) / "hparams.yaml").read_text()


@pytest.mark.skipif("enable_autolog_hparams" not in signature(L.Trainer).parameters, reason="since Lightning 2.5.2")
def test_no_hyperparameters_where_the_trainer_is_to_log_none(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    train(classifier(), quick(max_dendrites=0, base_epochs=1), logger=logger, enable_autolog_hparams=False)
    with pytest.raises(KeyError):
        read(logger.log_dir).PluginTagToContent(hparams.PLUGIN_NAME)


def test_a_resumed_run_draws_and_tells_all_of_it(tmp_path: Path) -> None:
    whole = quick()
    train(classifier(), whole)
    # In the middle of the second base phase: its score so far is in the checkpoint.
    trainer = train(classifier(), quick(), max_epochs=5, enable_checkpointing=True)
    logger, resumed = TensorBoardLogger(tmp_path), quick()
    train(classifier(), resumed, ckpt_path=trainer.checkpoint_callback.best_model_path, logger=logger)
    assert resumed.history == whole.history
    assert [len(record["scores"]) for record in resumed.history] == [2, 0, 2, 0, 2]
    events = read(logger.log_dir)
    assert [event.step for event in events.Images("dendrites/growth")] == ends(whole.history)[2:]
    assert len([line for line in texts(events)[0][1].splitlines() if line.startswith("1. ")]) == 3
    assert len(events.Tensors("custom_scalars__config__")) == 1


# -- figures ------------------------------------------------------------------------------------------------------


def record(phase: str, epochs: int, scores: list[float | None], accepted: bool | None = None, **more: Any) -> Any:
    return {"phase": phase, "epochs": epochs, "scores": scores, "accepted": accepted, "best_score": 0.5, **more}


def test_a_figure_has_each_phase_in_its_place_and_colour() -> None:
    history = [
        record("base", 3, [1.0, None, 0.8]),
        record("correlation", 2, []),
        record("base", 2, [0.7, 0.6, 0.55, 0.5], True, dendrites=1),
        record("correlation", 1, []),
        record("base", 4, [0.9, 0.7], False, dendrites=2),
    ]
    axes = draw_growth(history, "val_loss").axes[0]
    curves = [line for line in axes.lines if len(set(line.get_xdata())) > 1 and line.get_linestyle() == "-"]
    assert [list(curve.get_xdata()) for curve in curves] == [[1, 2, 3], [5.5, 6, 6.5, 7], [10, 12]]
    assert [list(curve.get_ydata()) for curve in curves][1:] == [[0.7, 0.6, 0.55, 0.5], [0.9, 0.7]]
    kept, also_kept, rejected = (curve.get_color() for curve in curves)
    assert kept == also_kept != rejected
    integrated = [line for line in axes.lines if list(line.get_ydata()) == [0, 1] and line not in curves]
    assert [(line.get_xdata()[0], line.get_color()) for line in integrated] == [(5, kept), (8, rejected)]
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches] == [(3, 5), (7, 8)]
    assert axes.get_xlim() == (0, 12)
    assert axes.get_ylabel() == "val_loss"
    assert axes.get_title(loc="left") == "Sets of dendrites: 1 kept, 1 rejected"


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_a_figure_shows_the_range_that_matters(mode: Any, sign: float) -> None:
    scores = [sign * score for score in [100.0, 50.0, *([0.3, 0.2] * 10)]]
    low, high = sorted(
        sign * limit for limit in draw_growth([record("base", 22, scores)], "s", mode).axes[0].get_ylim()
    )
    assert 0.1 < low < 0.2
    assert 0.3 < high < 0.4


@pytest.mark.parametrize("scores", [[], [None], [0.5], [0.5] * 20], ids=str)
def test_a_figure_of_few_or_equal_scores(scores: list[float | None]) -> None:
    low, high = draw_growth([record("base", len(scores), scores)], "s").axes[0].get_ylim()
    assert low < high


def test_drawing_leaves_pyplot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    logger = TensorBoardLogger(tmp_path)
    train(classifier(), quick(max_dendrites=0, base_epochs=1), logger=logger)
    assert len(read(logger.log_dir).Images("dendrites/growth")) == 1
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_text_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = TensorBoardLogger(tmp_path)
    train(classifier(), quick(max_dendrites=0, base_epochs=1), logger=logger)
    events = read(logger.log_dir)
    assert events.Tags()["images"] == []
    assert "pip install matplotlib" in texts(events)[0][1]


# -- other loggers ------------------------------------------------------------------------------------------------


class Plain(Logger):
    """What Lightning asks of a logger, and nothing more."""

    name, version = "plain", 0

    def __init__(self) -> None:
        super().__init__()
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.parameters: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.scalars.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.parameters.update(params)


class Pictures(Plain):
    """As that of Weights & Biases."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[int, str, tuple[int, ...]]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        assert isinstance(images, list)
        self.pictures.append((step, key, images[0].shape))


class Away:
    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("the server is away")


class Hostile(Plain):
    """Whose names raise, and those of its experiment too."""

    @property
    def experiment(self) -> Any:
        return Away()

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")


class Broken(Pictures):
    def log_image(self, *_: Any, **__: Any) -> None:
        raise OSError("no space left")


@pytest.mark.filterwarnings("error::UserWarning:pl_dendrites")
def test_each_logger_gets_what_it_can_show(run: dict[str, Any]) -> None:
    plain, pictures, hostile = Plain(), Pictures(), Hostile()
    dendrites = quick(max_dendrites=1)
    train(classifier(), dendrites, logger=[plain, pictures, hostile])
    assert len(plain.scalars) > 7
    assert repr(plain.scalars) == repr(pictures.scalars) == repr(hostile.scalars)
    assert plain.parameters["dendrites"] == {
        **{
            "base_epochs": 2,
            "candidates": 2,
            "form": "private",
            "correlation_patience": 10,
            "max_correlation_epochs": 2,
        },
        **{"form": "private", "max_dendrites": 1, "max_tries": 3, "monitor": "val_loss"},
    }
    assert pictures.pictures == [(step, "dendrites/growth", (690, 960, 3)) for step in ends(dendrites.history)]


@pytest.mark.parametrize("fails", ["logger", "drawing"])
def test_a_picture_that_fails_ends_no_fit(
    fails: str, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    if fails == "drawing":
        monkeypatch.setattr("pl_dendrites.reporting.figures.draw_growth", fail)
    dendrites, logger = quick(max_dendrites=1), Broken() if fails == "logger" else TensorBoardLogger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", ".* cannot show .*")
        train(classifier(), dendrites, logger=logger)
    (warning,) = caught
    assert re.search(r"cannot show .* `(log_image|experiment\.add_image)`.*no space left", str(warning.message))
    assert dendrites.stop_reason
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation", "base"]


def test_nothing_is_shown_of_a_fast_development_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".* cannot show .*")
        train(classifier(), quick(), logger=[TensorBoardLogger(tmp_path), CSVLogger(tmp_path)], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    pictures = Pictures()
    train(classifier(), quick(max_dendrites=0, base_epochs=1), logger=pictures)
    assert not any(key.startswith("dendrites/") for _, scalars in pictures.scalars for key in scalars)
    assert pictures.pictures == []
