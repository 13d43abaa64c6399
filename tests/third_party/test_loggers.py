"""Loggers of other makes get all of a fit, each in its own way; read back by what each of them writes without a server.

Run by ``make test-loggers``, which installs them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CometLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from pl_dendrites import DendriteCallback
from pl_dendrites.reporting.tables import decisions_markdown
from tests.models import classifier, quick, train
from tests.test_tensorboard import ends, read, texts

comet_ml = pytest.importorskip("comet_ml")
mlflow = pytest.importorskip("mlflow")
wandb = pytest.importorskip("wandb")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {"monitor": "val_loss", "max_dendrites": "1", "candidates": "2"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One fit into all of them at once."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        comet = CometLogger(api_key="0" * 25, online=False)
        # Lightning's logger asks Comet to write nothing when it is not online.
        comet._experiment = comet_ml.OfflineExperiment("0" * 25, offline_directory=str(place / "comet"), disabled=False)
        loggers = {
            "mlflow": MLFlowLogger("growth", tracking_uri=f"sqlite:///{place}/runs.db", artifact_location=str(place)),
            "wandb": WandbLogger(project="growth", save_dir=place, offline=True),
            "comet": comet,
            "tensorboard": TensorBoardLogger(place),
        }
        dendrites = quick(max_dendrites=1)
        train(classifier(), dendrites, logger=[*loggers.values()])
        found = {
            "summary": dict(loggers["wandb"].experiment.summary),
            "config": dict(loggers["wandb"].experiment.config),
        }
        wandb.finish()
        comet.experiment.end()
        yield {"dendrites": dendrites, "place": place, "loggers": loggers, **found}


def last(dendrites: DendriteCallback) -> dict[str, float]:
    """What a run's results are."""
    return {"dendrites/best_score": dendrites.best_model_score, "dendrites/count": dendrites.num_dendrites}


def is_figure(path: Any) -> bool:
    return np.asarray(Image.open(path).convert("RGB")).shape == (690, 960, 3)


def is_report(page: str) -> bool:
    return page.startswith("<!DOCTYPE html>") and "Growth of dendrites" in page and "Sets of dendrites" in page


def test_mlflow(run: dict[str, Any]) -> None:
    client, dendrites = run["loggers"]["mlflow"].experiment, run["dendrites"]
    found = client.get_run(run["loggers"]["mlflow"].run_id)
    place = Path(found.info.artifact_uri)
    assert {name: found.data.metrics[name] for name in last(dendrites)} == pytest.approx(last(dendrites))
    phases = client.get_metric_history(found.info.run_id, "dendrites/phase")
    assert [metric.value for metric in phases] == [0, 0, 1, 1, 0, 0]
    assert {name: found.data.params[f"dendrites/{name}"] for name in SETTINGS} == SETTINGS
    figures = sorted((place / "images").glob("dendrites*growth*.png"), key=lambda path: int(path.name.split("+")[2]))
    assert [int(path.name.split("+")[2]) for path in figures] == ends(dendrites.history)
    assert all(map(is_figure, figures))
    assert decisions_markdown(dendrites.history) in (place / "dendrites" / "decisions.md").read_text()
    assert is_report((place / "dendrites" / "report.html").read_text())


def test_wandb(run: dict[str, Any]) -> None:
    dendrites, (media,) = run["dendrites"], run["place"].glob("wandb/offline-run-*/files/media")
    assert {name: run["summary"][name] for name in last(dendrites)} == pytest.approx(last(dendrites))
    assert {name: str(run["config"]["dendrites"][name]) for name in SETTINGS} == SETTINGS
    figures = list((media / "images" / "dendrites").glob("growth_*.png"))
    assert len(figures) == len(dendrites.history)
    assert all(map(is_figure, figures))
    tables = [json.loads(path.read_text()) for path in (media / "table" / "dendrites").glob("decisions_*.json")]
    assert len(tables) == len(dendrites.history)
    longest = max((table["data"][0][0] for table in tables), key=len)
    assert decisions_markdown(dendrites.history) in longest
    (page,) = (media / "html" / "dendrites").glob("report_*.html")
    assert is_report(page.read_text())


def test_comet(run: dict[str, Any]) -> None:
    dendrites, (path,) = run["dendrites"], (run["place"] / "comet").glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        by_type: dict[str, list[Any]] = {}
        for message in messages:
            by_type.setdefault(message["type"], []).append(message["payload"])
        scalars = [payload["metric"] for payload in by_type["metric_msg"]]
        results = {metric["metricName"]: metric["metricValue"] for metric in scalars}
        assert {name: results[name] for name in last(dendrites)} == pytest.approx(last(dendrites))
        settings = {p["param"]["paramName"]: str(p["param"]["paramValue"]) for p in by_type["parameter_msg"]}
        assert {name: settings[f"dendrites|{name}"] for name in SETTINGS} == SETTINGS
        uploads: dict[str, list[Any]] = {}
        for payload in by_type["file_upload"]:
            uploads.setdefault(payload["upload_type"], []).append(payload)
        # Twice each: Comet takes what TensorBoard's writer is given, too.
        assert [p["additional_params"]["step"] for p in uploads["visualization"]][::2] == ends(dendrites.history)
        assert all(is_figure(archive.open(payload["file_path"])) for payload in uploads["visualization"])
        assert [p["additional_params"]["step"] for p in uploads["text-sample"]] == ends(dendrites.history)
        said = archive.read(uploads["text-sample"][-1]["file_path"]).decode()
        assert decisions_markdown(dendrites.history) in said
    (page,) = by_type["html"]
    assert is_report(page["html"])


def test_tensorboard_beside_them(run: dict[str, Any]) -> None:
    events, steps = read(run["loggers"]["tensorboard"].log_dir), ends(run["dendrites"].history)
    assert [event.step for event in events.Images("dendrites/growth")] == steps
    assert [step for step, _ in texts(events)] == steps
