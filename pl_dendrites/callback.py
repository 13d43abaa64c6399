"""The Lightning callback: arguments in, hooks handed on to the fit, what grew to be read off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from pl_dendrites.arguments import Settings
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.structure import grow_on_load, taken_whole
from pl_dendrites.core.targets import Predicate
from pl_dendrites.fit import Fit
from pl_dendrites.report import Report, write_report
from pl_dendrites.reporting.notebook import Sizes
from pl_dendrites.reporting.tables import summary
from pl_dendrites.saved.copies import share_weights
from pl_dendrites.saved.folder import weights_to_fit
from pl_dendrites.saved.partial import refuse_lost
from pl_dendrites.training.configuring import Configuring
from pl_dendrites.training.fsdp import Shards
from pl_dendrites.training.refusals import refuse_optimizers, refuse_unsupported
from pl_dendrites.training.trainer import Shadows, load_within, note_trust, save_by_way_of

__all__ = ["DendriteCallback"]

# `log` and `log_dict` are the model's: Lightning puts them there.
_OF_A_FIT = ("_fit", "_shards", "_stage", "_configuring", "_loading", "_saving", "log", "log_dict")
_NO_FIT = (
    "This callback never saw a fit. If your library copies callbacks, as NeuralForecast does, find the one that did in"
    " `trainer.callbacks`, or where the library keeps the Trainer's arguments."
)


class DendriteCallback(pl.Callback):
    """Grows dendrites on a model while a Trainer fits it.

    Training runs as usual until the monitored score stops improving. Then the best weights come back, the network
    stands still, and candidates are found by the error that remains: of private dendrites a pool for every neuron,
    which learns to correlate with that neuron's error; of shared ones units around the whole network, drawn and chosen
    by what they take from it. The best become dendrites, the network trains again with the new signal, and the set is
    kept if the score got better. When sets no longer help, training stops, and the model is the best one found.

    Args:
        monitor: the metric that decides, as logged by the model.
        mode: whether a good score is small or large.
        targets: names, glob patterns of names (``"encoder.*"``) or type names (``"Conv2d"``) of the layers that receive
            dendrites, or in code a predicate of name and module; ``None``: every Linear, convolution and recurrent
            layer that can and is not frozen; ``"frozen"``: every one that is, as of a pretrained network. A name, or a
            type name that none of these layers has, may mean any other module too, whose dendrites are then copies of
            it.
        exclude: layers that receive none, named in the same way.
        form: ``"shared"``: dendrites are units that a whole module shares. Each sees a few inputs of the module that
            vary together, and that are replaced while it learns, and feeds all its outputs. ``"private"``: each neuron
            of the ``targets`` has its own. ``None``: what other arguments mean; or else, once the first batch has shown
            what the model calls, shared around its network if that is one module of fully connected layers which maps
            vectors of numbers to outputs, and private where it is not, or where the model is sharded (FSDP2). The log
            and the report say which and why.
        around: names of modules that shared dendrites hang around; an empty name is the whole model.
        max_parameters: most parameters that the grown model may have, by shared dendrites: a number, or as many times
            those that it has. Growth is then early, in short phases, and one long phase follows. ``None``: the cycle of
            base phases that end when the score no longer improves; each set has as many units as there are, until one
            does not help, or there are ``max_dendrites`` sets. With ``targets``, a pretrained network's
            ``"frozen"`` layers above all, it is the number of parameters that are trainable in the end, a head
            included: one set of dendrites, which the neurons of a layer share, is placed on the layers where the loss
            falls most steeply. They see inputs along the directions in which these vary where the network errs.
        sets: with ``max_parameters`` how many sets of units these are shared out to, each twice the one before.
        growth_epochs: with ``max_parameters`` the length in epochs of base phases before the last, long one; ``None``:
            six, or a fifth of ``base_epochs`` where that is less; where dendrites are placed on frozen layers, they
            grow first.
        mirrors: name of each module that mirrors another without being trained (the average of its weights, the target
            network of a DQN), and of that: it grows as that does. ``None``: those that are frozen and begin as a copy.
        max_dendrites: most dendrites per neuron; of shared ones without ``max_parameters`` most sets.
        learning: the rule by which dendrites learn; ``None``: ``"correlation"`` for private ones, ``"hybrid"`` for
            shared ones. ``"correlation"``: candidates learn to correlate with the error of
            their neuron while the network stands still, and are frozen afterwards; shared ones are chosen by that
            error. ``"hybrid"``: in the same way first,
            then by gradient with the network. ``"gradient"``: by gradient alone, without correlation phases.
        candidates: candidates that compete for each neuron's next dendrite, or for the place of each shared one;
            ``None``: four, or eight for shared ones.
        candidate_batches: batches from whose gradients together candidates take one step. With one more than there are
            candidates, several processes communicate about what they do in a base step, or less, in the mean.
        fan_in: inputs that each dendrite keeps (of a convolution: channels), a number or a share: when a candidate's
            correlation no longer rises it keeps its strongest inputs and learns on with those alone, or by gradient
            with inputs drawn at random. ``None``: all; of shared ones 32. Recurrent layers and modules of one's own
            keep all inputs, and dendrites that are placed within a budget see 32 directions of all.
        share: below 1, each set grows only the neurons to which a dendrite is worth most for its parameters, of all
            layers, up to that share of what dendrites on all neurons would take. Not with ``learning="gradient"``.
        activation: what dendrites do with their sum: ``"tanh"``, ``"sigmoid"``, ``"relu"``, ``"gelu"`` or
            ``"sharp_gelu"``, which is between the last two; ``None``: that for shared dendrites; for private ones tanh
            where they are frozen, GELU where they learn by gradient.
        patience: a base phase ends after so many validations without improvement.
        min_delta: smallest change of the score that counts as improvement. ``None``: any keeps a set; a base phase goes
            on with a hundredth of what it gained since its first score, or with any if it is the last.
        min_delta_mode: whether ``min_delta`` is an absolute change (``"abs"``) or a share of the score to beat
            (``"rel"``).
        base_epochs: fixed length of a base phase in epochs, instead of ``patience``; a base phase in which nothing was
            measured yet, for validations are rarer, waits for a score.
        correlation_patience: a correlation phase ends when in so many epochs the correlations of no layer rose, in the
            mean of its neurons, by ``correlation_min_delta``.
        correlation_min_delta: smallest rise that counts, as a share of that mean.
        max_correlation_epochs: a correlation phase ends after so many epochs at the latest.
        skip_validation: do not validate in correlation phases, in which the network stands still and its scores with
            it. What other callbacks do when a validation ends, saving checkpoints above all, is skipped too.
        max_tries: new sets tried after one that did not help, before training stops.
        stop_on_overfit: end training, rather than try dendrites, where a base phase overfits: more than a third of all
            that the training loss fell in it came after its best score. The reason of the phase says so in any case.
        optimizer: makes the candidates' optimizer from their parameters; ``None``: Adam with learning rate 0.01.
        restart: start each base phase with optimizers and schedulers as they were when the fit began.
        dirpath: where to write ``best.ckpt``, a full checkpoint, at every new best; ``None``: no file.
        best_on: where the best network is. ``"memory"``: in main memory, and in checkpoints. ``"disk"``, for models
            that fill the memory: in a file of its own name for each, ``best-*.ckpt`` in ``dirpath``, a local directory
            that all processes see; checkpoints hold the name.
        keep_sizes: keep the best network of each size that the fit passes, for :meth:`take`, where the best network is:
            in memory and checkpoints, once for all that they have in common, or on the disk. ``None``: the largest of
            them, as long as all but the best take up to 16 MiB of memory; none on the disk, or of sharded models.
        verbose: say on the console what happens: one log line per event, with its reason, whether each set helped
            and what the fit leaves; and on the progress bar the phase, the dendrites per neuron and, in correlation
            phases, the largest correlation of the last epoch.

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
        targets: Literal["frozen"] | Sequence[str] | Predicate | None = None,
        exclude: Sequence[str] | Predicate = (),
        mirrors: Mapping[str, str] | None = None,
        form: Literal["shared", "private"] | None = None,
        around: Sequence[str] | None = None,
        max_parameters: int | float | None = None,
        sets: int = 3,
        growth_epochs: int | None = None,
        max_dendrites: int = 5,
        learning: Literal["correlation", "gradient", "hybrid"] | None = None,
        candidates: int | None = None,
        candidate_batches: int = 1,
        fan_in: int | float | None = None,
        share: float = 1.0,
        activation: Literal["tanh", "sigmoid", "relu", "gelu", "sharp_gelu"] | None = None,
        patience: int = 5,
        min_delta: float | None = None,
        min_delta_mode: Literal["abs", "rel"] = "abs",
        base_epochs: int | None = None,
        correlation_patience: int = 2,
        correlation_min_delta: float = 0.05,
        max_correlation_epochs: int = 40,
        skip_validation: bool = False,
        max_tries: int = 1,
        stop_on_overfit: bool = False,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        restart: bool = True,
        dirpath: str | Path | None = None,
        best_on: Literal["memory", "disk"] = "memory",
        keep_sizes: bool | None = None,
        verbose: bool = True,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        parameters = signature(DendriteCallback).parameters.items()
        defaults = {name: own.default for name, own in parameters if own.default is not own.empty}
        self._settings = Settings(arguments, defaults)
        self.monitor, self.mode = self._settings.monitor, self._settings.mode
        self._begin()

    def _begin(self) -> None:
        self._stage, self._shards = "", Shards(weights_to_fit)
        self._configuring: Configuring | None = None
        self._loading: Shadows | None = None
        self._saving: Shadows | None = None
        self._fit = Fit(self._settings, self._shards)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: the arguments, and what a checkpoint would hold; no model, no Trainer."""
        own = {name: value for name, value in vars(self).items() if name not in _OF_A_FIT}
        return {**own, "_fit": self._fit.state(together=False)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Be a callback between fits that can tell of the last one."""
        vars(self).update(state)
        self._begin()
        if state["_fit"]:
            self._fit.resume(state["_fit"])

    # -- what is read off it ------------------------------------------------------------------------------------------

    @property
    def network(self) -> DendriticNetwork | None:
        """The object that grows the model's dendrites, once a fit began; copies and pickles have none."""
        return self._fit.network

    @property
    def history(self) -> list[dict[str, Any]]:
        """A dict of plain values for every finished phase; a notebook shows them as a table.

        ``pandas.DataFrame(callback.history)`` has a row for each phase and a column for each key; the page on the
        report tells what they are.
        """
        return self._fit.history

    @property
    def phase(self) -> Literal["base", "correlation"]:
        """The phase that is running."""
        return self._fit.machine.phase

    @property
    def cycle(self) -> int:
        """0 in the first base phase; each set of dendrites that is tried starts the next."""
        return self._fit.machine.cycle

    @property
    def num_dendrites(self) -> int:
        """Dendrites per neuron, of the layers that have most."""
        return self._fit.machine.dendrites if self.network is None else self.network.num_dendrites

    @property
    def best_model_score(self) -> float | None:
        """Score of the best network so far."""
        return self._fit.machine.best

    @property
    def best_model_path(self) -> str:
        """Path of the file with the best network; empty where none was written."""
        return self._fit.best.path

    @property
    def stop_reason(self) -> str:
        """Why growth is over; empty while it is not."""
        return self._fit.machine.stop_reason

    def summary(self) -> str:
        """A table with a row per cycle: dendrites, parameters, epochs, best score, whether it was kept, and why.

        It fits 100 columns: a reason that is long goes on in the next line. A notebook shows it as a table.
        """
        return summary(self.history) if self._fit.began else _NO_FIT

    @property
    def frontier(self) -> list[dict[str, Any]]:
        """What :meth:`take` can put into a model: of each size that was passed the best network, the smallest first.

        Each is better than those before it. A dict has its ``parameters``, its ``score``, and the ``cycle`` and
        ``dendrites`` that it had; of shared dendrites ``units``, too.
        """
        return Sizes(self._fit.frontier.records)

    def take(self, model: nn.Module, *, parameters: int | None = None, score: float | None = None) -> dict[str, Any]:
        """Put one of the networks that the fit passed into a model, in place of the best one.

        Copies and pickles of the callback, and one that has loaded a checkpoint's state, can do that too.

        Args:
            model: the model that was fitted, or a new one of its class; it grows or shrinks to fit.
            parameters: most that it may have: the best network of those is taken.
            score: at least as good: the smallest network of those is taken. With neither of the two the best comes
                back.

        Returns:
            What :attr:`frontier` says of the network.

        Raises:
            ValueError: while a fit runs, or if no network that is kept is such; the model is then what it was.

        Example:
            >>> DendriteCallback("val_loss").take(nn.Linear(3, 2))
            Traceback (most recent call last):
            ValueError: no network that is kept has parameters=None, score=None; there are:
        """
        if self._fit.training:
            raise ValueError("a fit is running: its network is that of the fit")
        record = self._fit.frontier.take(model, parameters, score)
        if self.network is not None and self.network.model is model:
            self.network.follow_mirrored()
        return record

    def report(
        self, path: str | Path | None = None, controls: Mapping[str, Mapping[str, float]] | None = None
    ) -> Report | None:
        """Write a page that tells what grew where and when, what it gained, what was rejected and why, and the cost.

        Args:
            path: a ``.html`` file, complete in itself, or a ``.md`` file, which has its pictures beside it; ``None``:
                nothing is written.
            controls: plain networks to compare with; errors too are as in :func:`~pl_dendrites.report.write_report`.

        Returns:
            The report, which a notebook shows; in processes other than the first ``None``.
        """
        if not self._fit.began:
            raise ValueError(f"there is nothing to report: no fit has begun. {_NO_FIT}")
        return write_report(path, [*self.history, *filter(None, [self._fit.running()])], controls)

    # -- the fit begins and ends --------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let checkpoints of grown models load; refuse what cannot work."""
        grows_on_load = grow_on_load(pl_module)
        self._unload()
        if self._saving is not None:  # in place until now: a Trainer saves after a fit and after an exception, too
            self._saving.release()
        # A Trainer's checkpoint is of a whole model, for one with `strict_loading = False` too.
        self._loading = load_within(trainer, taken_whole)
        self._saving = save_by_way_of(
            trainer, lambda make: self._fit.save(trainer.lightning_module, make, self.state_key)
        )
        self._stage = str(getattr(stage, "value", stage))
        if self._stage == "fit":
            self._fit = Fit(self._settings, self._shards)
            refuse_unsupported(trainer, self.monitor, grows_on_load, self._settings.best_on)
            if self._settings.best_on == "disk":
                note_trust(trainer, self._loading, partial(setattr, self._fit.best, "trusting"))
            self._configuring = Configuring(trainer, pl_module, self._settings.schedule_epochs)
        self._shards.begin(trainer, pl_module, self._fit.attach if self._stage == "fit" else None)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the dendrites."""
        self._end_configuring()
        refuse_optimizers(trainer)
        self._fit.begin(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on in the phase that a checkpoint was saved in."""
        self._fit.begin_training(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the best network in the model. Only now, when no callback can save it under another's score."""
        self._fit.end(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undo whatever is still in place."""
        self._end_configuring()
        self._fit.let_go()
        self._shards.end()
        self._unload()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo everything; a checkpoint that is written on the exception still resumes where it happened."""
        self._end_configuring()
        self._shards.end()
        self._unload()
        self._fit.interrupt(trainer, pl_module, exception)

    def _end_configuring(self) -> None:
        if self._configuring is not None:
            self._configuring.release()
            self._configuring = None

    def _unload(self) -> None:
        if self._loading is not None:
            self._loading.release()
            self._loading = None

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score a network of which nothing is trainable as it is."""
        self._fit.untrained.begin_epoch(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Carry out what was decided. Only here, so that no checkpoint holds a changed model under an old score."""
        self._fit.begin_batch(trainer, pl_module, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Tell the candidates which layers this backward pass would train."""
        self._fit.begin_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the candidates learn from what this backward pass showed to all processes."""
        self._fit.end_backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the candidates whenever the model's optimizer would have stepped."""
        self._fit.end_batch(trainer, outputs)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the network validated that stands still in a correlation phase."""
        self._fit.begin_validation()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the network, if the metric comes from validation."""
        if trainer.state.fn == "fit" and trainer.sanity_checking:
            self._fit.end_check(trainer)
        elif trainer.state.fn == "fit":
            self._fit.end_validation(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the network, if the metric comes from training; count the epoch; log."""
        self._fit.end_epoch(trainer, pl_module)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain values."""
        return self._fit.state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a saved state; what belongs to the network follows when the fit starts.

        Raises:
            MisconfigurationException: if the state has a format that this version does not know, or is no state of a
                callback at all. The callback is then left as it was.
        """
        if self._stage not in ("", "fit"):
            return  # trainer.test(ckpt_path=...) looks at a model; it does not rewrite what happened here
        try:
            self._fit.resume(state_dict)
        except ValueError as error:
            raise MisconfigurationException(
                f"the checkpoint's DendriteCallback state cannot be read: {error}"
            ) from error

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put into the checkpoint what stands aside: schedulers in a correlation phase, all that an exception undid."""
        self._fit.save_beside(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        weights = state.get("best", {}).get("weights")
        if weights is not None:
            smaller = [size["weights"] for size in state["frontier"]["smaller"] if size["weights"] is not None]
            share_weights(checkpoint, weights, *smaller)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read what :meth:`on_save_checkpoint` wrote; refuse a checkpoint that lacks dendrites which the model had."""
        refuse_lost(pl_module, checkpoint)
        self._fit.load_beside(trainer, checkpoint)
