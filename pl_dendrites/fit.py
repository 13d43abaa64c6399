"""One fit that grows: what is decided is carried out here, recorded, shown and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_dendrites.arguments import Settings
from pl_dendrites.core.growth.sharded import is_sharded
from pl_dendrites.core.growth.used_layers import UsedLayers
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import Decision, PhaseMachine
from pl_dendrites.core.shared import SharedNetwork
from pl_dendrites.forming import Forming
from pl_dendrites.reporting.console import Console
from pl_dendrites.reporting.display import Display
from pl_dendrites.reporting.left_alone import LeftAlone
from pl_dendrites.reporting.records import History, phase_begins, phase_record, why_none
from pl_dendrites.saved.best import BestModel
from pl_dendrites.saved.fit_state import FitState, parameter_names_in
from pl_dendrites.saved.folder import SHARDED_KEY
from pl_dendrites.saved.frontier import Frontier
from pl_dendrites.saved.interrupted import Interrupted
from pl_dendrites.saved.partial import complete
from pl_dendrites.training import optimizers
from pl_dendrites.training.correlation_phase import CorrelationPhase
from pl_dendrites.training.fsdp import Shards, changing, saved_parameter_names
from pl_dendrites.training.processes import Processes
from pl_dendrites.training.rewiring import Rewiring
from pl_dendrites.training.score import Score, TrainingLoss
from pl_dendrites.training.trainer import Shadows, after_epoch_of, save_straight, unwrap, wrap
from pl_dendrites.training.untrained import Untrained

__all__ = ["Fit"]

_NAMES_KEY = "pl_dendrites_optimizer_parameters"


class Fit:
    """A fit, from the moment that a Trainer sets up for it until the next one begins.

    The callback's hooks call its methods, which bear the names of what happened.

    Args:
        settings: the callback's arguments.
        shards: what a sharded model needs.

    Attributes:
        network: the network, once the fit began.
        machine: decides about phases.
        best: the best network so far.
        frontier: the best of each size.
        untrained: its base phase while there is nothing to train.
        training: whether it is running.
        history: a record for every finished phase.
        began: whether there is anything to tell: it began, or took up a saved state.
    """

    def __init__(self, settings: Settings, shards: Shards) -> None:
        self.network: DendriticNetwork | None = None
        self.machine = PhaseMachine(**settings.machine)
        self.best = BestModel(settings.dirpath, settings.best_on == "disk", save_straight)
        self.frontier = Frontier(self.best, settings.keep_sizes, settings.mode)
        self.history = History()
        self._forming, self._shards = Forming(settings), shards
        self._score, self._loss = Score(settings.monitor), TrainingLoss()
        self._resumed: FitState | None = None  # a state that was loaded, until training starts
        self._saved_names: list[list[list[str]]] = []  # of optimizers' parameters in that checkpoint
        self._interrupted: Interrupted | None = None
        self.began = self.training = False
        self._initial: optimizers.OptimizerSettings | None = None
        self._correlation: CorrelationPhase | None = None
        self.untrained = Untrained()
        self._rewiring: Rewiring | None = None
        self._console: Console  # all three from when it begins
        self._shows: Display
        self._tells: LeftAlone
        self._uses = UsedLayers({})
        self._batches, self._counted = 0, -1  # trained so far; at the end of the last epoch
        self._late: Shadows | None = None  # an epoch that is counted when the model's own hook is over
        self._seed = 0

    # -- it begins and ends -------------------------------------------------------------------------------------------

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Attach the dendrites. Not when the Trainer sets up, for a model may make its layers only then."""
        self._seed = Processes(trainer).first(torch.initial_seed() % 2**31)
        self.attach(trainer, module)
        self._console = Console(trainer, self._settings.verbose)
        self._tells = LeftAlone(self._console.say, Processes(trainer))
        if not self._settings.is_open:
            self._tells.tell(self._network)
            self._tells.tell_frozen(self._network)
        self._initial = optimizers.OptimizerSettings(trainer)
        self._initial.complete()
        if self._resumed is not None:
            self.best.complete(module)
            self.frontier.complete()
            self._seed = self._resumed.seed
            self._uses.add(self._resumed.used)
            optimizers.order_parameters(trainer.optimizers, module, self._saved_names)
        settings = self._settings
        self._shows = Display(trainer, settings.monitor, settings.mode, settings.shown, progress=settings.verbose)
        self.began = self.training = True

    def attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take in the model, which may have dendrites already."""
        self._take(trainer, self._forming.attach(trainer, module, self._resumed, self.network))

    def _take(self, trainer: pl.Trainer, network: DendriticNetwork) -> None:
        self.network, state = network, self._resumed
        self._rewiring = Rewiring(trainer, network) if isinstance(network, SharedNetwork) else None
        self._uses = network.watch_use()
        self.machine = PhaseMachine(**self._settings.machine, dendrites=network.num_dendrites)
        if state is not None:
            self.machine.load_state_dict(state.machine)
        if self._rewiring is not None and state is not None and state.rewiring is not None:
            self._rewiring.load_state_dict(state.rewiring)
        if not self._settings.is_open:  # else the first batch tells what there will be
            self._shards.begin_training(network)

    def begin_training(self, trainer: pl.Trainer) -> None:
        """Go on in the phase that a checkpoint was saved in."""
        Processes(trainer).refuse_uneven_epochs(trainer)
        if self._shards.loaded:  # when the fit had begun, and what was saved of it came after that
            self.attach(trainer, trainer.lightning_module)
        running, self._resumed = None if self._resumed is None else self._resumed.correlation, None
        if running is not None or self.machine.phase == "correlation":  # interrupted before there were candidates
            self._start_candidates(trainer, running)
        self.untrained.begin(trainer, self.machine, self._network, self._settings.grows_first)
        if self.machine.stop_reason:
            trainer.should_stop = True
        self._console.begin_training()
        self._shows.begin_training(self.machine)

    def end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave the best network in the model."""
        self._finish(trainer, module, self.machine.stop_reason or "training ended")
        if self._network.num_dendrites == 0 and self._settings.max_dendrites > 0:
            rank_zero_warn(f"DendriteCallback: the model has no dendrites. {why_none(self.history)}")
        if self._counted >= 0:
            self._score.refuse_silence(trainer)

    def interrupt(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Undo everything; a checkpoint that is written on the exception still resumes where it happened."""
        if not self.training:
            return
        alone = not is_sharded(module)  # else all processes read and write weights together, and some are elsewhere
        if alone:
            if self._correlation is not None:
                self._correlation.hold_still()  # it may have come between a forward pass and its batch's end
            checkpoint: dict[str, Any] = {"optimizer_states": [o.state_dict() for o in trainer.optimizers]}
            self.save_beside(trainer, module, checkpoint)
            with self._network.thawed():
                self._interrupted = Interrupted.of(module, self.state(together=False), checkpoint, self.best.weights)
        self._finish(trainer, module, self.machine.stop_reason or f"interrupted by {type(exception).__name__}", alone)

    def let_go(self) -> None:
        """Give back what a correlation phase holds, and watch nothing."""
        self._forming.let_go()
        self.untrained.end()
        if self._correlation is not None:
            self._correlation.end()
            self._correlation = None
        if self._late is not None:
            self._late.release()

    def _finish(self, trainer: pl.Trainer, module: pl.LightningModule, reason: str, restore: bool = True) -> None:
        self._record(trainer, reason, told=restore)
        self.let_go()
        if restore:
            with changing(trainer, self._network):
                self._restore_best(trainer, module)
            self._console.end_fit(self.history, self._network, stays=not self.machine.goes_back)
        self.machine.wind_up()
        self._shows.end_fit(trainer, self.machine, self._network, self.history)
        self.training = False

    # -- training -----------------------------------------------------------------------------------------------------

    def begin_batch(self, trainer: pl.Trainer, module: pl.LightningModule, batch_idx: int) -> None:
        """Carry out what was decided."""
        self._forming.begin_batch(module)
        pending = self.machine.pending
        if pending is not None and pending.kind == "correlate":
            self._begin_correlation(trainer, module, pending, whole_epoch=batch_idx == 0)
        elif pending is not None and pending.kind == "prune":
            self._keep_strongest(trainer, pending, whole_epoch=batch_idx == 0)
        elif pending is not None:
            self._begin_base(trainer, module, pending)
        elif self._correlation is not None and batch_idx == 0:
            self._correlation.begin_epoch()
        if self._correlation is not None:
            self._correlation.begin_batch()
        elif self._rewiring is not None:
            self._rewiring.begin_batch(batch_idx, self.machine.epochs, self.machine.base_epochs)

    def begin_backward(self, loss: torch.Tensor) -> None:
        """Let backward run where no candidate reaches the loss: the rest is frozen, and that is no mistake."""
        if self._correlation is not None:
            self._correlation.begin_backward(loss)
        self.untrained.begin_backward(loss)

    def end_backward(self) -> None:
        """Let the candidates learn from what this backward pass showed to all processes."""
        if self._correlation is not None:
            self._correlation.end_backward()
            return
        self._shards.average_gradients()
        self._uses.look()

    def end_batch(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Step the candidates whenever the model's optimizer would have stepped."""
        self._batches += 1
        if self._correlation is not None:
            self._correlation.end_batch(trainer)
            return
        self._loss.add(outputs)
        if self._settings.is_open:
            self._settle_form(trainer)
        if self._rewiring is not None:
            self._rewiring.end_batch()
        self._uses.look()  # a model under manual optimization may call `loss.backward()` past Lightning

    def _settle_form(self, trainer: pl.Trainer) -> None:
        network = self._forming.end_batch(trainer, self._network)
        if network is not None:
            self._take(trainer, network)
        self._console.say(f"{self._settings.form} dendrites: {self._settings.record['form_reason']}")
        self._tells.tell(self._network)

    def begin_validation(self) -> None:
        """Have the network validated that stands still."""
        if self._correlation is not None:
            self._correlation.begin_validation()

    def end_check(self, trainer: pl.Trainer) -> None:
        """A validation ended, be it the one before training: it may be what logs the metric."""
        if self._score.after_check(trainer):
            self.machine.forget_scores()
            self.frontier.forget()

    def end_validation(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Score the network, if the metric comes from validation."""
        if self._correlation is not None:
            self._correlation.end_validation()
        self.end_check(trainer)
        score = self._score.after_validation(trainer, self._batches)
        if score is not None:
            self._act_on(trainer, module, self.machine.step(score, self._score.settled))

    def end_epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Score the network, if the metric comes from training; count the epoch; log."""
        if self._batches == self._counted:
            return  # a checkpoint from a validation makes Lightning end that epoch again
        self._counted = self._batches
        self._tells.tell_unreached(self._network)
        if self._score.may_come(trainer):
            self._late = after_epoch_of(module, lambda: self._count_epoch(trainer, module))
        else:
            self._count_epoch(trainer, module)

    def _count_epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Both before either is acted on: a file of the best network then says that this epoch is over.
        score = self._score.after_epoch(trainer, self._batches)
        decisions = [] if score is None else [self.machine.step(score, self._score.settled)]
        running = self._correlation
        loss = Processes(trainer).mean(self._loss.take())
        if running is None or running.whole_epoch:  # a part of an epoch is none: its few samples correlate by chance
            rose = running is not None and running.rose(self._settings.correlation_min_delta)
            decisions.append(self.machine.end_epoch(rose, loss, self._score.settled))
        for decision in decisions:
            self._act_on(trainer, module, decision)
        rate = None if running is None else running.learning_rate
        self._shows.end_epoch(trainer, self.machine, self._network, rate)

    def _act_on(self, trainer: pl.Trainer, module: pl.LightningModule, decision: Decision) -> None:
        if decision.is_best:
            self.frontier.keep(trainer, module, self.machine, self._network)
        if decision.kind in ("correlate", "grow") and not self._layers_to_grow(trainer):
            decision = self.machine.stop("no target layer was ever used")
        if decision.kind == "integrate" and not self._network.layers_with_error():
            decision = self.machine.stop("no target layer ever had a finite error")
        if decision.kind == "stop":
            self._console.say(f"growth ends: {decision.reason}")
            trainer.should_stop = True

    # -- phases -------------------------------------------------------------------------------------------------------

    def _begin_correlation(
        self, trainer: pl.Trainer, module: pl.LightningModule, decision: Decision, whole_epoch: bool
    ) -> None:
        self._record(trainer, decision.reason)
        if self.machine.goes_back:
            with changing(trainer, self._network):
                self._restore_best(trainer, module)
        self._commit()
        self._start_candidates(trainer, whole_epoch=whole_epoch)
        self._say_phase(decision)

    def _start_candidates(
        self, trainer: pl.Trainer, resumed: Mapping[str, Any] | None = None, whole_epoch: bool = True
    ) -> None:
        self._correlation = CorrelationPhase(
            trainer,
            self._network,
            seed=self._seed + self.machine.cycle,
            resumed=resumed,
            whole_epoch=whole_epoch,
            values=self.best.weights,
            **self._settings.phase,
        )

    def _keep_strongest(self, trainer: pl.Trainer, decision: Decision, whole_epoch: bool) -> None:
        assert self._correlation is not None
        self._correlation.keep_strongest(whole_epoch)
        self.machine.commit()
        self._console.say(f"candidates keep {self._settings.next['fan_in']} inputs, the strongest: {decision.reason}")

    def _begin_base(self, trainer: pl.Trainer, module: pl.LightningModule, decision: Decision) -> None:
        network = self._network
        self._record(trainer, decision.reason)
        with changing(trainer, network):
            if decision.kind == "integrate":
                used = network.layers_with_error()
                network.integrate()
            else:
                unwrap(trainer)
                self._restore_best(trainer, module)
                used = self._layers_to_grow(trainer)
                network.grow(used, torch.Generator().manual_seed(self._seed + self.machine.cycle + 1))
        self.let_go()
        self._tells.tell_unused(network, set(network.targets) - set(used), self._uses.bypassed)
        wrap(trainer)
        self._commit()
        if self._rewiring is not None:
            self._rewiring.begin_phase()
        optimizers.begin_phase(trainer.optimizers, self._initial, self._settings.restart)
        self._say_phase(decision)

    def _restore_best(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.best.restore(module):
            return
        self._network.follow_mirrored()
        # Gradients that are there, in the middle of a window of accumulation, are those of the weights that went.
        module.zero_grad()
        optimizers.forget_weights(trainer.optimizers)

    def _layers_to_grow(self, trainer: pl.Trainer) -> list[str]:
        names = self._network.can_grow()
        self._tells.tell(self._network)  # some are known only now
        self._uses.look()
        # Where a correlation phase would tell which are used, that does.
        return Processes(trainer).union(names, self._uses.names) if self._settings.by_gradient else names

    def _commit(self) -> None:
        self.machine.commit()
        self.untrained.end()
        self._shows.begin_phase(self.machine)

    # -- records ------------------------------------------------------------------------------------------------------

    def running(self) -> dict[str, Any] | None:
        """The record of the phase that is running."""
        if self.training:
            return self._describe(self.machine.stop_reason)
        return None if self._resumed is None else self._resumed.running

    def _record(self, trainer: pl.Trainer, reason: str, told: bool = True) -> None:
        self.history.append(self._describe(reason))
        if told:
            self._console.end_phase(self.history, stays=not self.machine.goes_back)
        self._shows.end_phase(trainer, self.history)

    def _describe(self, reason: str) -> dict[str, Any]:
        if self._resumed is not None and self._resumed.running is not None:  # no training came after the resume
            return {**self._resumed.running, "reason": reason}
        return phase_record(self.machine, self._network, reason) | self._settings.record

    def _say_phase(self, decision: Decision) -> None:
        pool = self._settings.phase["pool"]
        self._console.say(f"{phase_begins(self.machine, self._network, pool)}: {decision.reason}")

    @property
    def _settings(self) -> Settings:
        return self._forming.settings

    @property
    def _network(self) -> DendriticNetwork:
        assert self.network is not None
        return self.network

    # -- what a checkpoint holds --------------------------------------------------------------------------------------

    def state(self, together: bool = True) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain values.

        Args:
            together: whether all processes call this.
        """
        interrupted = self._still_interrupted()
        if interrupted is not None:
            return dict(interrupted.state)
        if not self.began:
            return {}  # a learning rate finder saves before there is anything to save, and loads that
        # Until training starts, a resumed correlation phase is no more than the state that it was resumed from.
        resumed = self._resumed
        saved, used = (None, []) if resumed is None else (resumed.correlation, resumed.used)
        best = self.best.state_dict()
        return FitState(
            machine=self.machine.state_dict(),
            history=[dict(record) for record in self.history],
            running=self.running(),
            best=best,
            frontier=self.frontier.state_dict(best["weights"]),
            seed=self._seed,
            score=self._score.state_dict(),
            loss=self._loss.state_dict(),
            batches=self._batches,
            counted=self._counted,
            correlation=saved if self._correlation is None else self._correlation.state_dict(together),
            used=sorted(self._uses.names) if self._settings.by_gradient and self.network is not None else used,
            monitor=self._settings.monitor if resumed is None else resumed.monitor,
            mode=self._settings.mode if resumed is None else resumed.mode,
            form=self._settings.settled_form if resumed is None else resumed.form,
            rewiring=(None if resumed is None else resumed.rewiring)
            if self._rewiring is None
            else self._rewiring.state_dict(together),
            mirrors=(resumed.mirrors if resumed is not None else {}) if self.network is None else self.network.mirrors,
        ).to_dict()

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Take up a saved state; what belongs to the network follows when the fit begins.

        Args:
            saved: from :meth:`state`.

        Raises:
            ValueError: if it cannot be that, or is that of a fit by another metric or with other mirrors. Everything is
                then as it was.
        """
        state = FitState.from_dict(saved)
        state.refuse_other(self._settings.monitor, self._settings.mode, self._settings.mirrors)
        self.best.load_state_dict(state.best)
        self.frontier.load_state_dict(state.frontier)
        if self._correlation is None:
            self._resumed = state
        elif state.correlation is not None:  # a learning rate finder puts back what it disturbed
            self._correlation.load_state_dict(state.correlation)
        self.began = True
        self.machine.load_state_dict(state.machine)
        self.history = History(dict(record) for record in state.history)
        self._score.load_state_dict(state.score)
        self._loss.load_state_dict(state.loss)
        self._seed, self._batches, self._counted = state.seed, state.batches, state.counted

    def save(self, module: pl.LightningModule, make: Callable[[], dict[str, Any]], callback: str) -> dict[str, Any]:
        """A checkpoint; it has what dendrites need, whatever the model leaves out.

        Args:
            module: the model.
            make: has the Trainer make one.
            callback: under which name the callback's state is there.
        """
        with nullcontext() if self.network is None else self.network.thawed():
            checkpoint, then = make(), self._still_interrupted()
            complete(checkpoint, module, callback, None if then is None else then.checkpoint["state_dict"])
        return checkpoint

    def save_beside(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put into a checkpoint what stands aside: schedulers in a correlation phase, all that an exception undid.

        Optimizer state is saved by position; the names say what each position was.
        """
        interrupted = self._still_interrupted()
        if interrupted is not None:
            checkpoint.update(interrupted.checkpoint)
            return
        if not self.began:
            return
        if self._correlation is not None:
            self._correlation.save_beside(trainer, checkpoint)
        checkpoint[_NAMES_KEY] = saved_parameter_names(trainer.optimizers, module)
        checkpoint[SHARDED_KEY] = is_sharded(module)

    def _still_interrupted(self) -> Interrupted | None:
        # During `interrupt` itself the state is that of the exception, whatever the weights.
        if self._interrupted is not None and not self.training and not self._interrupted.still(self._network.model):
            self._interrupted = None
        return self._interrupted

    def load_beside(self, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Read the names that :meth:`save_beside` wrote."""
        self.best.checkpoint = trainer.ckpt_path
        self._saved_names = parameter_names_in(checkpoint, _NAMES_KEY)
