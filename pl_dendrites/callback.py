"""The Lightning callback: hooks in, the core's work and log lines out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from pl_dendrites import host, optimizers
from pl_dendrites.arguments import check_arguments, machine_settings, shown_settings
from pl_dendrites.checkpoint import BestModel, model_weights
from pl_dendrites.core.hosts import grow_on_load
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import Decision, PhaseMachine
from pl_dendrites.core.targets import Predicate
from pl_dendrites.core.used import UsedLayers
from pl_dendrites.correlation import CorrelationPhase
from pl_dendrites.history import by_reason, phase_record, why_none
from pl_dendrites.monitor import Display
from pl_dendrites.persistence import Persistence
from pl_dendrites.ranks import Ranks
from pl_dendrites.refusals import refuse_optimizers, refuse_unsupported
from pl_dendrites.score import Score
from pl_dendrites.sharding import Shards, changing, is_sharded
from pl_dendrites.training_loss import TrainingLoss

__all__ = ["DendriteCallback"]


class DendriteCallback(Persistence):
    """Grows dendrites on a model while a Trainer fits it.

    Training runs as usual until the monitored score stops improving. Then the best weights come back, the network is
    frozen, and a pool of candidates for every neuron learns to correlate with that neuron's remaining error. The best
    candidate of each neuron becomes a dendrite, the network trains again with the new signal, and the set is kept if
    the score got better. When sets no longer help, training stops, and the model is the best one found.

    Args:
        monitor: the metric that decides, as logged by the model.
        mode: whether a good score is small or large.
        targets: names, glob patterns of names (``"encoder.*"``) or type names (``"Conv2d"``) of the layers that receive
            dendrites, or in code a predicate of name and module; ``None``: every Linear, convolution and recurrent
            layer that can and is not frozen. A name, or a type name that none of these layers has, may mean any other
            module too, whose dendrites are then copies of it.
        exclude: layers that receive none, named in the same way.
        max_dendrites: most dendrites per neuron.
        learning: the rule by which dendrites learn. ``"correlation"``: candidates learn to correlate with the error of
            their neuron while the network stands still, and are frozen afterwards. ``"hybrid"``: in the same way first,
            then by gradient with the network. ``"gradient"``: by gradient alone, without correlation phases.
        candidates: candidates that compete for each neuron's next dendrite.
        candidate_batches: batches from whose gradients together candidates take one step. With one more than there are
            candidates, several processes communicate about what they do in a base step, or less, in the mean.
        fan_in: inputs that each dendrite keeps (of a convolution: channels), a number or a share: when a candidate's
            correlation no longer rises it keeps its strongest inputs and learns on with those alone, or by gradient
            with inputs drawn at random. ``None``: all. Recurrent layers and modules of one's own keep all inputs.
        share: below 1, each set grows only the neurons to which a dendrite is worth most for its parameters, of all
            layers, up to that share of what dendrites on all neurons would take. Not with ``learning="gradient"``.
        activation: what dendrites do with their sum: ``"tanh"``, ``"sigmoid"``, ``"relu"`` or ``"gelu"``; ``None``:
            tanh where dendrites are frozen, GELU where they learn by gradient.
        patience: a base phase ends after so many validations without improvement.
        min_delta: smallest change of the score that counts as improvement.
        min_delta_mode: whether ``min_delta`` is an absolute change (``"abs"``) or a share of the score to beat
            (``"rel"``).
        base_epochs: fixed length of a base phase in epochs, instead of ``patience``.
        correlation_patience: a correlation phase ends when in so many epochs no neuron's correlation rose by
            ``correlation_min_delta``.
        correlation_min_delta: smallest rise of a correlation that counts, as a share of it.
        max_correlation_epochs: a correlation phase ends after so many epochs at the latest.
        skip_validation: do not validate in correlation phases, in which the network stands still and its scores with
            it. What other callbacks do when a validation ends, saving checkpoints above all, is skipped too.
        max_tries: new sets tried after one that did not help, before training stops.
        stop_on_overfit: end training, rather than try dendrites, where a base phase overfits: since its best score the
            training loss fell by more than a third. The reason of the phase says so in any case.
        optimizer: makes the candidates' optimizer from their parameters; ``None``: Adam with learning rate 0.01.
        restart: start each base phase with optimizers and schedulers as they were when the fit began.
        dirpath: where to write ``best.ckpt``, a full checkpoint, at every new best; ``None``: no file. The best network
            is held in memory and in the callback's state in any case.
        verbose: say on the console what happens: one log line per event, with its reason, and on the progress bar the
            phase, the dendrites per neuron and, in correlation phases, the largest correlation of the last epoch.

    Attributes:
        network: the :class:`~pl_dendrites.core.DendriticNetwork`, once a fit began.
        history: a dict of plain values for every finished phase.

    Raises:
        ValueError: if an argument is out of range.
        MisconfigurationException: at the start of a fit that cannot grow dendrites; says why and what to do.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Regressor(BoringModel):
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", self.step(batch))
        >>> dendrites = DendriteCallback("val_loss", base_epochs=1, max_correlation_epochs=1, max_dendrites=1)
        >>> trainer = L.Trainer(
        ...     callbacks=[dendrites],
        ...     max_epochs=3,
        ...     limit_train_batches=2,
        ...     limit_val_batches=2,
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(Regressor())
        >>> [record["phase"] for record in dendrites.history]
        ['base', 'correlation', 'base']
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "min",
        *,
        targets: Sequence[str] | Predicate | None = None,
        exclude: Sequence[str] | Predicate = (),
        max_dendrites: int = 5,
        learning: Literal["correlation", "gradient", "hybrid"] = "correlation",
        candidates: int = 4,
        candidate_batches: int = 1,
        fan_in: int | float | None = None,
        share: float = 1.0,
        activation: Literal["tanh", "sigmoid", "relu", "gelu"] | None = None,
        patience: int = 10,
        min_delta: float = 0.0,
        min_delta_mode: Literal["abs", "rel"] = "abs",
        base_epochs: int | None = None,
        correlation_patience: int = 5,
        correlation_min_delta: float = 0.05,
        max_correlation_epochs: int = 40,
        skip_validation: bool = False,
        max_tries: int = 1,
        stop_on_overfit: bool = False,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        restart: bool = True,
        dirpath: str | Path | None = None,
        verbose: bool = True,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        check_arguments(arguments)
        self.monitor = monitor
        self.mode: Literal["min", "max"] = mode
        self.history: list[dict[str, Any]] = []
        self.network: DendriticNetwork | None = None
        self._targets, self._exclude = targets, exclude
        live = learning != "correlation"
        self._next: dict[str, Any] = {
            "activation": activation or ("gelu" if live else "tanh"),
            "live": live,
            "fan_in": fan_in,
            "share": share,
        }
        self._pool, self._max_dendrites = candidates, max_dendrites
        self._correlation_min_delta = correlation_min_delta
        self._candidates: dict[str, Any] = {
            "pool": candidates,
            "batches": candidate_batches,
            "optimizer": optimizer,
            "validate": not skip_validation,
        }
        self._restart, self._verbose, self._dirpath = restart, verbose, dirpath
        self._shown = shown_settings(arguments, DendriteCallback)
        self._machine_settings = machine_settings(arguments)
        self._rule = {"monitor": monitor, "mode": mode, "learning": learning}
        self._stage, self._shards = "", Shards()
        self._start_anew()

    def _start_anew(self) -> None:
        self.history = []
        self._machine = PhaseMachine(**self._machine_settings)
        self._best = BestModel(self._dirpath)
        self._resumed: dict[str, Any] | None = None
        self._interrupted: dict[str, Any] | None = None
        self._optimizer_parameters: list[list[list[str]]] = []
        self._begun = self._fitting = False
        self._initial: optimizers.OptimizerSettings | None = None
        self._correlation: CorrelationPhase | None = None
        self._display: Display | None = None
        self._used: UsedLayers | None = None  # where no correlation phase would tell
        self._score, self._loss = Score(self.monitor), TrainingLoss()
        self._batches = 0
        self._counted = -1  # batches at the end of the last epoch
        self._seed = 0

    # -- the fit begins and ends ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let checkpoints of grown models load; refuse what cannot work."""
        grows_on_load = grow_on_load(pl_module)
        self._stage = str(getattr(stage, "value", stage))
        if self._stage == "fit":
            self._start_anew()
            refuse_unsupported(trainer, self.monitor, grows_on_load)
        self._shards.begin(trainer, pl_module, self._attach if self._stage == "fit" else None)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the dendrites. Not in ``setup``, for models may make layers in ``setup`` and ``configure_model``."""
        refuse_optimizers(trainer)
        self._seed = Ranks(trainer).first(torch.initial_seed() % 2**31)
        network = self._attach(trainer, pl_module)
        for reason, names in by_reason(network.skipped).items():
            self._say(trainer, f"no dendrites for {', '.join(map(repr, names))}: {reason}")
        self._initial = optimizers.OptimizerSettings(trainer)
        if self._resumed is not None:
            self._machine.load_state_dict(self._resumed["machine"])
            self._seed = self._resumed["seed"]
            if self._used is not None:
                self._used.add(self._resumed["used"])
            optimizers.order_parameters(trainer.optimizers, pl_module, self._optimizer_parameters)
        self._display = Display(trainer, self.monitor, self.mode, self._shown, progress=self._verbose)
        self._begun = self._fitting = True

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> DendriticNetwork:
        learning = self._rule["learning"]
        network = self.network = DendriticNetwork(pl_module, self._targets, self._exclude)
        network.set_next(**self._next)
        self._used = network.watch_use() if learning == "gradient" else None
        # A fit that grows dendrites gives optimizers their output weights alone; let fresh optimizers of a model that
        # had dendrites before hold the same.
        optimizers.adopt_parameters(trainer.optimizers, network.frozen_parameters(), network.trained_parameters())
        self._machine = PhaseMachine(**self._machine_settings, dendrites=network.num_dendrites)
        self._shards.begin_training(network)
        return network

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on in the phase that a checkpoint was saved in."""
        Ranks(trainer).refuse_uneven_epochs(trainer)
        running, self._resumed = (self._resumed or {}).get("correlation"), None
        if running is not None:
            self._start_candidates(trainer, running)
        elif self.phase == "correlation":  # interrupted before there were candidates
            self._start_candidates(trainer)
        if self.stop_reason:
            trainer.should_stop = True
        assert self._display is not None
        self._display.begin_training(self._machine)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the best network in the model. Only now, when no callback can save it under another's score."""
        self._finish(trainer, pl_module, self.stop_reason or "training ended")
        if self.num_dendrites == 0 and self._max_dendrites > 0:
            rank_zero_warn(f"DendriteCallback: the model has no dendrites. {why_none(self.history)}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undo whatever is still in place."""
        self._let_go()
        self._shards.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo everything; a checkpoint that is written on the exception still resumes where it happened."""
        self._shards.end()
        if not self._fitting:
            return
        alone = not is_sharded(pl_module)  # else all processes read and write weights together, and some are elsewhere
        if alone:
            checkpoint: dict[str, Any] = {"optimizer_states": [o.state_dict() for o in trainer.optimizers]}
            self.on_save_checkpoint(trainer, pl_module, checkpoint)
            checkpoint["state_dict"] = model_weights(pl_module)
            self._interrupted = {"callback": self.state_dict(), "checkpoint": checkpoint}
        self._finish(trainer, pl_module, self.stop_reason or f"interrupted by {type(exception).__name__}", alone)

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Carry out what was decided. Only here, so that no checkpoint holds a changed model under an old score."""
        pending = self._machine.pending
        if pending is not None and pending.kind == "correlate":
            self._begin_correlation(trainer, pl_module, pending)
        elif pending is not None and pending.kind == "prune":
            self._keep_strongest(trainer, pending)
        elif pending is not None:
            self._begin_base(trainer, pl_module, pending)
        elif self.phase == "correlation" and batch_idx == 0:
            assert self.network is not None
            self.network.reset_correlations()
        if self._correlation is not None:
            self._correlation.begin_batch()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Let backward run where no candidate reaches the loss: the rest is frozen, and that is no mistake."""
        if self._correlation is None:
            return
        self._correlation.begin_backward()
        if not loss.requires_grad:
            loss.requires_grad_(True)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the candidates learn from what this backward pass showed to all processes."""
        if self._correlation is not None:
            self._correlation.end_backward()
            return
        self._shards.average_gradients()
        if self._used is not None:
            self._used.look()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the candidates whenever the model's optimizer would have stepped."""
        self._batches += 1
        if self._correlation is not None:
            self._correlation.end_batch(trainer)
            return
        self._loss.add(outputs)
        if self._used is not None:
            self._used.look()  # a model under manual optimization may call `loss.backward()` past Lightning

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the network, if the metric comes from validation."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._step(trainer, pl_module, self._score.after_validation(trainer, self._batches))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the network, if the metric comes from training; count the epoch; log."""
        if self._batches == self._counted:
            return  # a checkpoint from a validation makes Lightning end that epoch again
        self._counted = self._batches
        assert self.network is not None
        self._step(trainer, pl_module, self._score.after_epoch(trainer, self._batches))
        rose = self._correlation is not None and self._correlation.rose(self._correlation_min_delta)
        loss = Ranks(trainer).mean(self._loss.take())
        self._act_on(trainer, pl_module, self._machine.end_epoch(rose, loss))
        rate = None if self._correlation is None else self._correlation.learning_rate
        assert self._display is not None
        self._display.end_epoch(trainer, self._machine, self.network, rate)

    def _step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, score: float | None) -> None:
        if score is not None:
            self._act_on(trainer, pl_module, self._machine.step(score))

    def _act_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: Decision) -> None:
        if decision.is_best:
            self._best.keep(trainer, pl_module)
        assert self.network is not None
        if decision.kind in ("correlate", "grow") and not self._layers_to_grow(trainer):
            decision = self._machine.stop("no target layer was ever used")
        if decision.kind == "integrate" and not self.network.layers_with_error():
            decision = self._machine.stop("no target layer ever had a finite error")
        if decision.kind == "stop":
            self._say(trainer, f"growth ends: {decision.reason}")
            trainer.should_stop = True

    # -- phases ---------------------------------------------------------------------------------------------------

    def _begin_correlation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: Decision) -> None:
        assert self.network is not None
        self._record(trainer, decision.reason)
        with changing(trainer, self.network):
            self._best.restore(pl_module)
        self._commit()
        self._start_candidates(trainer)
        self._say(
            trainer, f"correlation phase of cycle {self.cycle}, candidates per neuron {self._pool}: {decision.reason}"
        )

    def _start_candidates(self, trainer: pl.Trainer, resumed: Mapping[str, Any] | None = None) -> None:
        assert self.network is not None
        seed = self._seed + self.cycle
        self._correlation = CorrelationPhase(trainer, self.network, seed=seed, resumed=resumed, **self._candidates)

    def _keep_strongest(self, trainer: pl.Trainer, decision: Decision) -> None:
        assert self._correlation is not None
        self._correlation.keep_strongest()
        self._machine.commit()
        self._say(trainer, f"candidates keep their strongest inputs, fan_in={self._next['fan_in']}: {decision.reason}")

    def _begin_base(self, trainer: pl.Trainer, pl_module: pl.LightningModule, decision: Decision) -> None:
        assert self.network is not None
        self._record(trainer, decision.reason)
        with changing(trainer, self.network):
            if decision.kind == "integrate":
                used = self.network.layers_with_error()
                self.network.integrate()
            else:
                host.unwrap(trainer)
                self._best.restore(pl_module)
                used = self._layers_to_grow(trainer)
                self.network.grow(used, torch.Generator().manual_seed(self._seed + self.cycle + 1))
        self._let_go()
        for name in sorted(set(self.network.targets) - set(used)):
            rank_zero_warn(f"'{name}' never had an error and gets no dendrites: it is not used in training.")
        host.wrap(trainer)
        self._commit()
        if self._restart:
            assert self._initial is not None
            optimizers.forget(trainer.optimizers)
            self._initial.restore()
        else:
            optimizers.drop_spoilt_state(trainer.optimizers)
        self._say(
            trainer, f"base phase of cycle {self.cycle}, dendrites per neuron {self.num_dendrites}: {decision.reason}"
        )

    def _layers_to_grow(self, trainer: pl.Trainer) -> list[str]:
        assert self.network is not None
        names = self.network.can_grow()
        return names if self._used is None else Ranks(trainer).union(names, self._used.names)

    def _commit(self) -> None:
        assert self._display is not None
        self._machine.commit()
        self._display.begin_phase(self._machine)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str, restore: bool = True) -> None:
        assert self.network is not None
        self._record(trainer, reason)
        self._let_go()
        if restore:
            with changing(trainer, self.network):
                self._best.restore(pl_module)
        self._machine.wind_up()
        assert self._display is not None
        self._display.end_fit(trainer, self._machine, self.network)
        self._fitting = False

    def _let_go(self) -> None:
        if self._correlation is not None:
            self._correlation.end()
            self._correlation = None

    # -- records --------------------------------------------------------------------------------------------------

    def _record(self, trainer: pl.Trainer, reason: str) -> None:
        assert self._display is not None
        self.history.append(self._describe(reason))
        self._display.end_phase(trainer, self.history)

    def _describe(self, reason: str) -> dict[str, Any]:
        assert self.network is not None
        saved = (self._resumed or {}).get("running")  # if so, no training came after the resume
        return {**saved, "reason": reason} if saved else phase_record(self._machine, self.network, reason) | self._rule

    def _running(self) -> dict[str, Any] | None:
        return self._describe(self.stop_reason) if self._fitting else (self._resumed or {}).get("running")

    def _say(self, trainer: pl.Trainer, message: str) -> None:
        if self._verbose:
            with host.bar_aside(trainer):
                rank_zero_info(f"DendriteCallback: {message}")
