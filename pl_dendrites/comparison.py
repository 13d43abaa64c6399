"""Would another network, or the same one trained for longer, have done as well? The controls beside the dendrites."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng

from pl_dendrites.controls import Stages, closest_width, pruned, sparse, weights_of
from pl_dendrites.core.cost import parameter_count
from pl_dendrites.trials import Run, Trials, seeds_aside, without_dendrites

__all__ = ["Comparison", "Run", "closest_width", "compare"]

Factory = Callable[[int], pl.LightningModule]
# What a control is called, and beside one of several networks with dendrites.
_NAMES = {
    "wider": ("wider, restarted", "as large as {}, restarted"),
    "deeper": ("deeper, restarted", "deeper, as large as {}, restarted"),
    "pruned": ("pruned", "pruned, as large as {}"),
    "sparse": ("sparse", "sparse, as large as {}"),
}
_STAGES: dict[str, Stages] = {"pruned": pruned, "sparse": sparse}


@dataclass(frozen=True)
class Comparison:
    """What :func:`pl_dendrites.compare` found; printed, it is a table.

    Attributes:
        metric: name of the metric on test data.
        runs: one for every network and seed.
    """

    metric: str
    runs: tuple[Run, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Every run as a dict of plain values, as for JSON."""
        return [asdict(run) for run in self.runs]

    def __str__(self) -> str:
        """A row for every network: mean and standard deviation over the seeds."""
        names = list(dict.fromkeys(run.name for run in self.runs))
        width = max(map(len, names))
        lines = [f"{'':{width}}  {self.metric:>18}  parameters       bytes  epochs  seconds"]
        for name in names:
            runs = [run for run in self.runs if run.name == name]
            results = [run.result for run in runs]
            spread = f" ± {statistics.stdev(results):.2g}" if len(runs) > 1 else ""
            result = f"{statistics.mean(results):.4g}{spread}"
            keys = ("parameters", "bytes", "epochs", "seconds")
            size, saved, epochs, seconds = (statistics.mean(getattr(run, key) for run in runs) for key in keys)
            lines.append(f"{name:{width}}  {result:>18}  {size:10,.0f}  {saved:10,.0f}  {epochs:6.0f}  {seconds:7.1f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Control:
    # What stands beside a network with dendrites: of a width that goes by its parameters, restarted or in stages.
    factory: Factory
    named: str
    times: float = 1.0
    stages: Stages | None = None

    def run(self, trials: Trials, name: str, grown: Run, arguments: Mapping[str, Any]) -> Run:
        if self.stages is not None:
            make = partial(self.factory, self._dense(grown.parameters))
            return trials.in_stages(name, grown, make, self.stages, arguments)
        make = partial(self.factory, closest_width(self._count, grown.parameters, self.named))
        return trials.restarted(name, grown.seed, make, without_dendrites(arguments), beside=[grown])

    def _dense(self, left: int) -> int:
        width = closest_width(self._count, round(self.times * left), self.named)
        # What is no weight stays: of a small network it must leave some room.
        return max(bisect_right(range(1, width + 1), left // 2, key=self._beside_weights), 1)

    def _count(self, width: int) -> int:
        with isolate_rng():
            return parameter_count(self.factory(width))

    def _beside_weights(self, width: int) -> int:
        with isolate_rng():
            model = self.factory(width)
        return parameter_count(model) - sum(weight.numel() for weight in weights_of(model).values())


def compare(
    model: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    dendrites: Mapping[str, Any] | Mapping[str, Mapping[str, Any]],
    metric: str,
    *,
    wider: Factory | None = None,
    deeper: Factory | None = None,
    pruned: bool = False,
    sparse: bool = False,
    dense: float = 4.0,
    seeds: int = 3,
    trainer: Mapping[str, Any] | None = None,
) -> Comparison:
    """Train a model as it is, with dendrites, and other networks with as many parameters.

    All stop by the rule of :class:`~pl_dendrites.DendriteCallback`, by their validation score, and are tested once with
    the best weights. Restarts alone can help, and so can longer training: networks that are plain are restarted from
    their best weights, with fresh optimizers, as often as sets of dendrites were tried and until they have had as many
    epochs, and the best network of all these fits is tested. Networks some of whose weights are zero have just as many
    that are not as the network with dendrites has parameters, and are trained for as many epochs in all.

    Args:
        model: makes the model.
        data: makes its data, with a test part.
        dendrites: arguments of the ``DendriteCallback``, or several such by what they are to be called. The plain model
            is then trained as much as the one that took most, by the arguments of the first.
        metric: what the model logs in ``test_step``.
        wider: makes the model with a width; the width whose parameters come closest to those of the network with
            dendrites is taken, for each of several settings. ``None``: no such control, and no honest answer to whether
            width would have done.
        deeper: the same with one more hidden layer, say; ``None``: no such control.
        pruned: whether to cut a large network down: trained whole for two sevenths of the epochs, then without the
            smallest of all its weights, in four cuts; every fit between begins with fresh optimizers and from the best
            weights of the last. See :func:`~pl_dendrites.controls.pruned`.
        sparse: whether to train a large network that is sparse from the start, with weights that move: RigL, see
            :func:`~pl_dendrites.controls.sparse`.
        dense: how large that large network is, which ``wider`` makes: so many times the parameters that are left, or
            less where its biases and what else is no weight would take more than half of these.
        seeds: the whole is run with seeds 0, 1, ...
        trainer: settings of the Trainer, added to ``max_epochs=-1`` and no output. Every fit gets a copy of what is in
            them, for callbacks and loggers remember the fits they saw.

    Returns:
        All runs.

    Raises:
        ValueError: if ``seeds`` is not positive, ``dense`` not above 1, ``pruned`` or ``sparse`` have no ``wider``, or
            no width makes a network as large as it must be.
        MisconfigurationException: if the metric is not logged in ``test_step``; lists those that are. If ``trainer``
            ends a first fit before it was validated.

    Example:
        >>> from torch import nn
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        >>> class Model(BoringModel):
        ...     def __init__(self, width=1):
        ...         super().__init__()
        ...         self.layer = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 2))
        ...
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", self.step(batch))
        ...
        ...     def test_step(self, batch, batch_idx):
        ...         self.log("test_loss", self.step(batch))
        >>> comparison = compare(
        ...     Model,
        ...     BoringDataModule,
        ...     {"monitor": "val_loss", "base_epochs": 1, "max_correlation_epochs": 1, "max_dendrites": 1},
        ...     metric="test_loss",
        ...     wider=Model,
        ...     pruned=True,
        ...     seeds=1,
        ...     trainer={"limit_train_batches": 2, "limit_val_batches": 2},
        ... )
        >>> [run.name for run in comparison.runs]
        ['plain', 'with dendrites', 'plain, restarted', 'wider, restarted', 'pruned']
    """
    if seeds < 1:
        raise ValueError(f"`seeds` must be at least 1, got {seeds}")
    if not dense > 1:
        raise ValueError(f"`dense` must be above 1, got {dense}")
    if (pruned or sparse) and wider is None:
        raise ValueError("`pruned` and `sparse` begin with a network that `wider` makes, and there is none")
    several = bool(dendrites) and all(isinstance(value, Mapping) for value in dendrites.values())
    settings: Mapping[str, Mapping[str, Any]] = dendrites if several else {"with dendrites": dendrites}
    trials = Trials(data, metric, trainer or {})
    factories, cut = {"wider": wider, "deeper": deeper}, {"pruned": pruned, "sparse": sparse}
    controls = {kind: _Control(make, kind) for kind, make in factories.items() if make is not None}
    if wider is not None:
        controls |= {kind: _Control(wider, "wider", dense, _STAGES[kind]) for kind, asked in cut.items() if asked}
    first = without_dendrites(next(iter(settings.values())))
    runs = []
    with seeds_aside():
        for seed in range(seeds):
            grown = [trials.restarted(name, seed, model, arguments) for name, arguments in settings.items()]
            runs += [trials.restarted("plain", seed, model, first), *grown]
            runs.append(trials.restarted("plain, restarted", seed, model, first, beside=grown))
            for kind, control in controls.items():
                name = _NAMES[kind][len(grown) > 1]
                runs += [control.run(trials, name.format(run.name), run, settings[run.name]) for run in grown]
    return Comparison(metric, tuple(runs))
