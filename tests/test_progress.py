"""What the progress bars say of growth."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from pl_dendrites import DendriteCallback
from tests.models import classifier, quick, train


def shown(text: str) -> list[dict[str, str]]:
    """The items of ours in each state of a bar."""
    found = re.findall(r"phase[=:] ?(\w+)\W+dendrites[=:] ?(\d+)(?:\W+correlation[=:] ?(0\.\d+))?", text)
    return [dict(zip(("phase", "dendrites", "correlation"), items, strict=True)) for items in found]


def check(states: list[dict[str, str]], dendrites: DendriteCallback) -> None:
    phases = {(state["phase"], state["dendrites"]) for state in states}
    assert phases == {("base", "0"), ("correlation", "0"), ("base", "1"), ("correlation", "1"), ("base", "2")}
    assert all(state["phase"] == "correlation" for state in states if state["correlation"])
    largest = [
        f"{max(layer['max'] for layer in record['correlation'].values()):.3f}"
        for record in dendrites.history
        if record["phase"] == "correlation"
    ]
    assert len(largest) == 2
    assert set(largest) <= {state["correlation"] for state in states}


def test_a_tqdm_bar(capsys: pytest.CaptureFixture[str]) -> None:
    dendrites = quick(verbose=True)
    train(classifier(), dendrites, TQDMProgressBar(), enable_progress_bar=True)
    check(shown(capsys.readouterr().out), dendrites)


def test_a_rich_bar() -> None:
    dendrites, screen = quick(verbose=True), io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 240})
    train(classifier(), dendrites, bar, enable_progress_bar=True)
    check(shown(re.sub(r"\x1b\[[\d;?]*\w", "", screen.getvalue())), dendrites)


def test_a_bar_of_the_users_own_keeps_its_items_and_is_given_back() -> None:
    class Own(TQDMProgressBar):
        def get_metrics(self, trainer, pl_module) -> dict[str, Any]:
            items = super().get_metrics(trainer, pl_module)
            items.pop("v_num", None)
            return {**items, "phase": "mine"}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
            seen.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))

    bar, seen = Own(), []
    train(classifier(), quick(verbose=True), Look(), bar, enable_progress_bar=True)
    assert {items["phase"] for items in seen} == {"mine"}
    assert {items["dendrites"] for items in seen} == {"0", "1", "2"}
    assert "get_metrics" not in vars(bar)


def test_each_event_has_a_line_of_its_own_beside_a_tqdm_bar(capsys: pytest.CaptureFixture[str]) -> None:
    before: dict[str, str] = {}

    class Screen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            before[record.getMessage()] = capsys.readouterr().out

    handler, logger = Screen(), logging.getLogger()
    logger.addHandler(handler)
    try:
        train(classifier(), quick(verbose=True), TQDMProgressBar(), enable_progress_bar=True)
    finally:
        logger.removeHandler(handler)
    events = [shown for message, shown in before.items() if message.startswith("DendriteCallback: ")]
    assert len(events) == 8
    assert "it/s" in events[0]
    # Where the line begins, the bar is wiped out, or is over.
    assert all(shown.endswith("\r") for shown in events[:-2])
    assert events[-2].endswith("\n")
    assert events[-1] == ""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_gives_the_bar_back(error: type[BaseException]) -> None:
    class Fail(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            raise error

    bar = TQDMProgressBar()
    with pytest.raises((error, SystemExit)):
        train(classifier(), quick(verbose=True), Fail(), bar, enable_progress_bar=True)
    assert "get_metrics" not in vars(bar)


def test_verbose_false_says_nothing_on_bars_either(capsys: pytest.CaptureFixture[str]) -> None:
    train(classifier(), quick(verbose=False, max_dendrites=1), TQDMProgressBar(), enable_progress_bar=True)
    out = capsys.readouterr().out
    assert "Epoch 0" in out
    assert "dendrites" not in out
    assert "phase" not in out


def test_what_bars_show_is_no_metric_of_the_model() -> None:
    trainer = train(classifier(), quick(verbose=True, max_dendrites=1), TQDMProgressBar(), enable_progress_bar=True)
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss", "val_acc"}
