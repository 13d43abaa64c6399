"""What is shown of growth: scalars in every logger, log lines, the summary, the history."""

from __future__ import annotations

import csv
import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from pl_dendrites import DendriteCallback
from pl_dendrites.core.cost import parameter_count
from pl_dendrites.reporting.records import correlation_figures
from pl_dendrites.reporting.tables import summary_table
from tests.models import Classifier, bits, classifier, quick, train

LAYERS = ["net.0", "net.4"]
CORRELATIONS = {f"dendrites/correlation_{kind}/{name}" for kind in ("mean", "max") for name in LAYERS}
RESULTS = {"dendrites/count", "dendrites/parameters", "dendrites/best_score"}
STATE = RESULTS | {"dendrites/phase", "dendrites/cycle", "dendrites/seconds_epoch", "dendrites/seconds_phase"}


class Epochs(L.Callback):
    """What was so at the end of every epoch, and the steps at which Lightning's own epoch metrics appear."""

    def __init__(self, dendrites: DendriteCallback) -> None:
        self.dendrites = dendrites
        self.rows: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.rows.append(
            {
                "phase": float(self.dendrites.phase == "correlation"),
                "cycle": float(self.dendrites.cycle),
                "count": float(self.dendrites.num_dendrites),
                "parameters": float(sum(p.numel() for p in pl_module.parameters())),
                "val_loss": float(trainer.callback_metrics["val_loss"]),
            }
        )


def read_csv(logger: CSVLogger) -> list[dict[str, float]]:
    """What was logged at each step; the logger writes what arrives at different times into rows of their own."""
    steps: dict[str, dict[str, float]] = {}
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            steps.setdefault(row["step"], {}).update({key: float(value) for key, value in row.items() if value})
    return list(steps.values())


def read_events(logger: TensorBoardLogger) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One fit into two loggers at once."""
    directory = tmp_path_factory.mktemp("logs")
    loggers = [CSVLogger(directory), TensorBoardLogger(directory)]
    dendrites = quick(base_epochs=3)
    epochs = Epochs(dendrites)
    model = classifier()
    train(model, epochs, dendrites, logger=loggers, log_every_n_steps=2)
    assert dendrites.stop_reason
    return {"csv": loggers[0], "events": loggers[1], "dendrites": dendrites, "epochs": epochs.rows, "model": model}


# -- loggers ------------------------------------------------------------------------------------------------------


def test_scalars_reach_the_csv_logger(run: dict[str, Any]) -> None:
    rows = [row for row in read_csv(run["csv"]) if "dendrites/phase" in row]
    expected = run["epochs"]
    assert len(rows) == len(expected) == 3 + 2 + 3 + 2 + 3
    for key in ("phase", "cycle", "count", "parameters"):
        assert [row[f"dendrites/{key}"] for row in rows] == [row[key] for row in expected], key
    base = [row["val_loss"] if row["phase"] == 0 else float("inf") for row in expected]
    assert [row["dendrites/best_score"] for row in rows] == pytest.approx(list(accumulate(base, min)))
    for row in rows:
        assert {key for key in row if key.startswith("dendrites/")} == (
            STATE | CORRELATIONS | {"dendrites/candidates_lr"} if row["dendrites/phase"] == 1 else STATE
        )
        assert row.get("dendrites/candidates_lr", 0.01) == 0.01
        assert 0 < row["dendrites/seconds_epoch"] <= row["dendrites/seconds_phase"]


def test_seconds_of_a_phase_add_up_over_its_epochs(run: dict[str, Any]) -> None:
    rows = iter([row for row in read_csv(run["csv"]) if "dendrites/phase" in row])
    for record in run["dendrites"].history:
        epochs = [next(rows) for _ in range(record["epochs"])]
        seconds = accumulate(row["dendrites/seconds_epoch"] for row in epochs)
        assert [row["dendrites/seconds_phase"] for row in epochs] == pytest.approx(list(seconds))


def test_the_last_values_are_those_of_the_network_that_a_fit_leaves(tmp_path: Path) -> None:
    logger, dendrites, model = CSVLogger(tmp_path), quick(min_delta=10.0, max_tries=0), classifier()
    train(model, dendrites, logger=logger)
    last_epoch, last = read_csv(logger)[-2:]
    assert last_epoch["dendrites/count"] == 1.0  # the set on trial, which goes
    assert last == {
        "step": last_epoch["step"] + 1,
        "dendrites/count": 0.0,
        "dendrites/parameters": float(parameter_count(model)),
        "dendrites/best_score": pytest.approx(dendrites.best_model_score),
    }


def test_scalars_stand_at_the_step_of_lightnings_own(run: dict[str, Any]) -> None:
    *rows, _ = read_csv(run["csv"])
    assert [row["step"] for row in rows] == [4 * epoch + 3 for epoch in range(13)]
    assert all({"dendrites/phase", "val_loss", "train_loss"} <= row.keys() for row in rows)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 3}, {"max_steps": 14}])
def test_they_do_so_where_not_every_batch_of_an_epoch_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    train(classifier(), quick(), logger=logger, **settings)
    *rows, _ = read_csv(logger)
    assert len(rows) >= 4
    assert [row["step"] for row in rows if "dendrites/phase" in row] == [row["step"] for row in rows]
    assert all("train_loss" in row for row in rows)


def test_scalars_reach_tensorboard(run: dict[str, Any]) -> None:
    events, rows = read_events(run["events"]), read_csv(run["csv"])
    assert events.keys() >= STATE | CORRELATIONS
    for tag in STATE | CORRELATIONS:
        expected = [(int(row["step"]), row[tag]) for row in rows if tag in row]
        assert [step for step, _ in events[tag]] == [step for step, _ in expected]
        assert [value for _, value in events[tag]] == pytest.approx([value for _, value in expected])
    assert [step for step, _ in events["dendrites/phase"]] == [step for step, _ in events["val_loss"]]


def test_correlations_are_correlations(run: dict[str, Any]) -> None:
    rows = [row for row in read_csv(run["csv"]) if row.get("dendrites/phase") == 1]
    assert len(rows) == 4
    for row in rows:
        for name in LAYERS:
            mean, largest = (row[f"dendrites/correlation_{kind}/{name}"] for kind in ("mean", "max"))
            assert 0 < mean <= largest <= 1


def test_no_logger(run: dict[str, Any]) -> None:
    dendrites, model = quick(base_epochs=3), classifier()
    train(model, dendrites, logger=False)
    assert dendrites.history == run["dendrites"].history


def test_correlations_equal_those_computed_from_scratch(tmp_path: Path) -> None:
    """Over the samples of an epoch, of the best candidate of each neuron, with its weights as they were then."""
    logger = CSVLogger(tmp_path)
    dendrites = quick(candidates=3, max_correlation_epochs=3)
    model = classifier()
    outputs: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    errors: dict[str, list[Tensor]] = {name: [] for name in LAYERS}

    class Record(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            for values in (*outputs.values(), *errors.values()):
                values.clear()

        def on_train_start(self, trainer, pl_module) -> None:
            # Now, so that they come after the dendrites' own and see what the next layer sees.
            for name in LAYERS:
                pl_module.get_submodule(name).register_forward_hook(self.hook(name))

        def hook(self, name: str) -> Any:
            def record(layer, args, out) -> None:
                if dendrites.phase == "correlation" and out.requires_grad:
                    nodes = dendrites.network.candidates[name].nodes
                    pool = torch.tanh(args[0] @ nodes.weight.T + nodes.bias).detach()
                    outputs[name].append(pool.unflatten(1, (3, -1)).double())
                    out.register_hook(lambda error: errors[name].append(error.double()))

            return record

    train(model, Record(), dendrites, logger=logger, max_epochs=5)
    logged = read_csv(logger)[-2]
    for name in LAYERS:
        pool, error = torch.cat(outputs[name]), torch.cat(errors[name])
        assert len(pool) == len(error) == 128
        best = [
            max(abs(float(torch.corrcoef(torch.stack([pool[:, p, c], error[:, c]]))[0, 1])) for p in range(3))
            for c in range(error.shape[1])
        ]
        assert logged[f"dendrites/correlation_mean/{name}"] == pytest.approx(sum(best) / len(best), rel=1e-4)
        assert logged[f"dendrites/correlation_max/{name}"] == pytest.approx(max(best), rel=1e-4)


def test_figures_of_a_layer_without_a_name() -> None:
    figures = correlation_figures({"": torch.tensor([[0.1, -0.5, 0.0], [-0.3, 0.2, 0.0]])})
    assert figures[""] == pytest.approx({"mean": (0.3 + 0.5 + 0.0) / 3, "max": 0.5})
    assert correlation_figures({}) == {}


# -- the metric ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_step", [False, True])
def test_a_monitored_training_loss_is_the_mean_over_the_epoch(on_step: bool) -> None:
    """During a validation ``callback_metrics`` holds the last batch's loss under the same name."""

    class StepLogging(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=on_step, on_epoch=True)
            losses.append(loss.item())
            return loss

    losses: list[float] = []
    torch.manual_seed(0)
    dendrites = quick("train_loss", max_dendrites=0, base_epochs=3)
    train(StepLogging(), dendrites)
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, len(losses), 4)]
    assert dendrites.best_model_score == pytest.approx(min(means))
    assert dendrites.history[0]["epochs"] == len(means) == 3


# -- log lines ----------------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("DendriteCallback: ")]


def test_a_log_line_for_every_event_with_its_reason(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    dendrites = quick(verbose=True, min_delta=10.0, max_tries=1, candidates=3, targets=["net.?"])
    with caplog.at_level("INFO"):
        train(classifier(), dendrites)
    scores = [f"{record['score']:.4g}" for record in dendrites.history if record["score"] is not None]
    figures = r"val_loss (\S+) -> (\S+)( \(\S+ %\))?"
    said = [re.sub(figures, r"val_loss \1 -> \2", line) for line in lines(caplog)]
    assert said == [
        f"DendriteCallback: {text}"
        for text in (
            "no dendrites for 'net.1', 'net.2', 'net.3': it has no weight matrix",
            "correlation phase of cycle 1, candidates per neuron 3: 2 epochs are over",
            "base phase of cycle 1, dendrites per neuron 1: 2 correlation epochs are over",
            f"set 1 did not help and was taken away: val_loss {scores[0]} -> {scores[1]}, less than min_delta asks for",
            "correlation phase of cycle 2, candidates per neuron 3: 2 epochs are over;"
            " the set did not help and is discarded, a new one is tried",
            "base phase of cycle 2, dendrites per neuron 1: 2 correlation epochs are over",
            "growth ends: 2 epochs are over; 2 sets in a row did not help",
            f"set 2 did not help and was taken away: val_loss {scores[0]} -> {scores[2]}, less than min_delta asks for",
            f"best val_loss {scores[0]}: 0 of 2 sets kept;"
            " the best network, 0 dendrites per neuron, 56 parameters, is in the model",
        )
    ]
    assert capsys.readouterr().out == ""


def test_verbose_false_is_silent(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level("DEBUG"):
        train(classifier(), quick(verbose=False))
    assert lines(caplog) == []
    assert not any("dendrites" in record.name for record in caplog.records)
    assert capsys.readouterr().out == ""


# -- the summary and the history ----------------------------------------------------------------------------------


def test_the_summary_has_a_row_per_cycle(run: dict[str, Any]) -> None:
    lines = re.sub(r"\n {10,}", " ", run["dendrites"].summary())  # a reason that is long goes on in the next line
    head, rule, *rows = lines.splitlines()
    assert head.split("  ")[0] == "cycle"
    assert head.split() == ["cycle", "dendrites", "parameters", "epochs", "best", "val_loss", "accepted", "why"]
    assert set(rule) == {"-", " "}
    base = [record for record in run["dendrites"].history if record["phase"] == "base"]
    assert len(rows) == len(base) == 3
    for cycle, (row, record) in enumerate(zip(rows, base, strict=True)):
        cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
        assert cells == [
            str(cycle),
            str(cycle),
            str(record["parameters"]),
            "3" if cycle == 0 else "2 + 3",
            f"{record['score']:.4g}",
            *([] if cycle == 0 else ["yes" if record["accepted"] else "no"]),
            record["reason"],
        ]
    assert run["dendrites"].num_dendrites == base[-1]["dendrites"] == 2


def test_the_summary_before_and_in_the_middle() -> None:
    dendrites = quick()
    assert dendrites.summary().splitlines()[2:] == []
    train(classifier(), dendrites, max_epochs=3)
    last = dendrites.summary().splitlines()[-1].split()
    assert last == ["1", "0", str(dendrites.history[0]["parameters"]), "1", "training", "ended"]


def test_the_summary_aligns_its_columns() -> None:
    record = {"phase": "base", "dendrites": 0, "epochs": 1, "score": 0.123456, "accepted": True, "reason": "r"}
    table = summary_table([record | {"cycle": i, "parameters": 10 ** (3 * i)} for i in range(3)]).splitlines()
    assert [line.index("  r") for line in table[2:]] == [table[0].index("  why")] * 3
    assert [line.split()[2] for line in table[2:]] == ["1", "1,000", "1,000,000"]
    assert all("0.1235  yes" in line for line in table[2:])


def test_the_history_is_plain_and_has_a_record_per_phase(run: dict[str, Any]) -> None:
    history = run["dendrites"].history
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    assert [record["phase"] for record in history] == ["base", "correlation", "base", "correlation", "base"]
    assert [record["cycle"] for record in history] == [0, 1, 1, 2, 2]
    assert [record["epochs"] for record in history] == [3, 2, 3, 2, 3]
    assert [record["dendrites"] for record in history] == [0, 0, 1, 1, 2]
    for record in history:
        base = record["phase"] == "base"
        assert (record["score"] is not None) == base
        assert (record["accepted"] is not None) == (base and record["cycle"] > 0)
        assert record["correlation"].keys() == (set() if base else set(LAYERS))
        assert record["reason"]
    scores = [row["val_loss"] for row in run["epochs"]]
    assert history[0]["score"] == history[0]["best_score"] == min(scores[:3])
    assert history[2]["score"] == min(scores[5:8])
    assert history[-1]["best_score"] == min(scores[:3] + scores[5:8] + scores[10:]) == run["dendrites"].best_model_score
    assert [record["scores"] for record in history] == [scores[:3], [], scores[5:8], [], scores[10:]]
    assert history[-1]["parameters"] == parameter_count(run["model"])


def test_parameters_count_dendrites_and_no_candidates(run: dict[str, Any]) -> None:
    plain = parameter_count(classifier())
    assert plain == 4 * 6 + 6 + 6 + 6 + 6 * 2 + 2
    counts = [record["parameters"] for record in run["dendrites"].history]
    # V and v of each dendrite, its output weight, and from the second on the links to earlier ones.
    one = (4 + 1 + 1) * 6 + (6 + 1 + 1) * 2
    assert counts == [plain, plain, plain + one, plain + one, plain + 2 * one + 6 + 2]
    buffers = 2 * 6 + 1 + 2 * 2  # BatchNorm's statistics and counter; a code of two numbers per layer
    assert counts[-1] + buffers == sum(value.numel() for value in bits(run["model"]).values())
