"""Figures, texts and the report reach the trackers that people use, each in its own way.

The trackers here are stand-ins with the signatures of the real ones, which ``make test-loggers`` tries.
"""

from __future__ import annotations

import re
import sys
import warnings
from html import escape
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from pl_dendrites.reporting import figures
from pl_dendrites.reporting.tables import decisions_markdown
from tests.models import classifier, quick, train
from tests.test_tensorboard import ends


class Tracker(Logger):
    """A logger of Lightning's; ``got`` is all that arrived but scalars."""

    name, version = "tracker", 0

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, list[Any]] = {"picture": [], "text": [], "page": []}
        self.metrics: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(metrics)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        pass


class MLflow(Tracker):
    """Whose experiment is a client for all runs."""

    run_id = "7"

    @property
    def experiment(self) -> Any:
        return self

    def log_image(
        self, run_id: str, image: Any, artifact_file: Any = None, key: str | None = None, step: int | None = None
    ) -> None:
        assert (run_id, artifact_file, key) == ("7", None, "dendrites/growth")
        self.got["picture"].append((step, image.shape))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        assert run_id == "7"
        kind = {"dendrites/decisions.md": "text", "dendrites/report.html": "page"}[artifact_file]
        self.got[kind].append((None, text))


class Comet(Tracker):
    @property
    def experiment(self) -> Any:
        return self

    def log_image(self, image_data: Any, name: str | None = None, overwrite: bool = False, *, step: int) -> None:
        assert (name, overwrite) == ("dendrites/growth", False)
        self.got["picture"].append((step, image_data.shape))

    def log_text(self, text: str, step: int | None = None, metadata: Any = None) -> None:
        assert metadata == {"tag": "dendrites/decisions"}
        self.got["text"].append((step, text))

    def log_html(self, html: str, clear: bool = False) -> None:
        assert not clear
        self.got["page"].append((None, html))


class Wandb(Tracker):
    """Whose logger has the methods."""

    experiment = SimpleNamespace(log=None, config={})

    def use_artifact(self) -> None:
        pass

    def log_table(self) -> None:
        pass

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert key == "dendrites/growth"
        self.got["picture"] += [(step, image.shape) for image in images]

    def log_text(
        self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: Any = None
    ) -> None:
        assert (key, columns, dataframe) == ("dendrites/decisions", ["dendrites/decisions"], None)
        self.got["text"].append((step, data[0][0]))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "dendrites/report" in metrics:
            self.got["page"].append((step, metrics["dendrites/report"].data))
        super().log_metrics(metrics, step)


MAKES = [MLflow, Comet, Wandb]


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """One fit into all of them."""
    trackers, drawn, draw_growth = [make() for make in MAKES], [], figures.draw_growth

    def draw(*arguments: Any) -> Any:
        drawn.append(arguments)
        return draw_growth(*arguments)

    page = SimpleNamespace(Html=lambda data, inject: SimpleNamespace(data=data, inject=inject))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", page)
        patch.setattr(figures, "draw_growth", draw)
        dendrites = quick(max_dendrites=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".* cannot show .*")
            train(classifier(), dendrites, logger=trackers)
    return {"history": dendrites.history, "trackers": {type(one): one for one in trackers}, "drawn": drawn}


@pytest.mark.parametrize("make", MAKES)
def test_a_figure_after_each_phase(make: type[Tracker], run: dict[str, Any]) -> None:
    assert run["trackers"][make].got["picture"] == [(step, (690, 960, 3)) for step in ends(run["history"])]


@pytest.mark.parametrize("make", MAKES)
def test_the_reasons_after_each_phase(make: type[Tracker], run: dict[str, Any]) -> None:
    found, history = run["trackers"][make].got["text"], run["history"]
    assert [step for step, _ in found] == ([None] * 3 if make is MLflow else ends(history))
    for number, (_, text) in enumerate(found, 1):
        assert decisions_markdown(history[:number]) in text


@pytest.mark.parametrize("make", MAKES)
def test_the_report_when_the_fit_ends(make: type[Tracker], run: dict[str, Any]) -> None:
    ((_, page),) = run["trackers"][make].got["page"]
    assert page.startswith("<!DOCTYPE html>")
    assert all(escape(record["reason"]) in page for record in run["history"])


def test_a_figure_is_drawn_once_for_all(run: dict[str, Any]) -> None:
    assert len(run["drawn"]) == len(run["history"])


class Refusing(MLflow):
    """A server that takes Lightning's own metrics and nothing else."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("dendrites/") for name in metrics):
            raise ConnectionError("too many metrics")

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        if "dendrites" in params:
            raise ConnectionError("too many settings")

    def log_image(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("too many pictures")

    def log_text(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("too many words")


def test_a_logger_that_refuses_all_ends_no_fit_and_is_told_of_once() -> None:
    dendrites, other = quick(max_dendrites=0, base_epochs=1), Comet()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", ".* cannot show .*")
        train(classifier(), dendrites, logger=[Refusing(), other])
    assert [record["phase"] for record in dendrites.history] == ["base"]
    said = sorted(re.search("too many [a-z]+", str(warning.message))[0] for warning in caught)
    assert said == [f"too many {what}" for what in ("metrics", "pictures", "settings", "words")]
    assert {kind: len(found) for kind, found in other.got.items()} == {"picture": 1, "text": 1, "page": 1}
