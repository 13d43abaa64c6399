"""Which form the dendrites of a fit have: known when it begins, or once its first batch shows what a model calls."""

from __future__ import annotations

import lightning.pytorch as pl

from pl_dendrites.arguments import Settings
from pl_dendrites.core.growth.hooks import take_off_empty
from pl_dendrites.core.growth.sharded import reshard
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.shared import SharedNetwork
from pl_dendrites.saved.fit_state import FitState
from pl_dendrites.training.attaching import CALLED_FOR_STEPS, attach_to_fit
from pl_dendrites.training.first_calls import FirstCalls, Form, known_form
from pl_dendrites.training.trainer import calls_for_steps, shards

__all__ = ["Forming"]


class Forming:
    """Attaches dendrites to the model of a fit, private ones as long as nothing tells where shared ones would hang.

    Args:
        settings: the callback's arguments.

    Attributes:
        settings: these, with the form as far as it is settled.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._calls: FirstCalls | None = None

    def attach(
        self, trainer: pl.Trainer, module: pl.LightningModule, saved: FitState | None, before: DendriticNetwork | None
    ) -> DendriticNetwork:
        """Take in the model, which may have dendrites already.

        Args:
            trainer: the Trainer.
            module: the model.
            saved: a state that the fit goes on from.
            before: the network so far, which found the model's mirrors when the fit began.
        """
        if self.settings.is_free:
            form = self._known(trainer, module, saved)
            self.settings = self.settings if form is None else self.settings.settled(*form)
        return self._attach(trainer, module, saved, before)

    def _attach(
        self, trainer: pl.Trainer, module: pl.LightningModule, saved: FitState | None, before: DendriticNetwork | None
    ) -> DendriticNetwork:
        reshard(module)  # optimizers hold parameters by identity, and after a forward pass a module's may be others
        if before is not None:
            take_off_empty(module)  # it may have been of the other form
        mirrors, settings = self.settings.mirrors, self.settings
        found = saved or before
        if mirrors is None and found is not None:
            mirrors = found.mirrors or None
        network = attach_to_fit(trainer, module, settings.next, **settings.attached, mirrors=mirrors)
        if isinstance(network, SharedNetwork) and saved is not None:
            network.tell_neurons(saved.neurons)  # the next batch may be one in which the network stands still
        return network

    def _known(self, trainer: pl.Trainer, module: pl.LightningModule, saved: FitState | None) -> Form | None:
        if saved is not None and saved.form is not None:
            return Form(**saved.form)
        known = known_form(module, shards(trainer) and not self.settings.asks_for_shared)
        # A state from before there was a choice, or of a callback that was told, does not say.
        begun = saved is not None and saved.batches > 0
        return Form(None, "it was so in the checkpoint") if known is None and begun else known

    def begin_batch(self, module: pl.LightningModule) -> None:
        """Watch what the model calls, if that is to tell."""
        if self.settings.is_open:
            self.let_go()
            self._calls = FirstCalls(module)

    def let_go(self) -> None:
        """Watch no longer, where the first batch never ends: it failed, or was skipped."""
        if self._calls is not None:
            self._calls.end()
            self._calls = None

    def end_batch(self, trainer: pl.Trainer, before: DendriticNetwork) -> DendriticNetwork | None:
        """The first batch is over, and settles the form: nothing was scored yet, and nothing has grown.

        Args:
            trainer: the Trainer.
            before: the network so far.

        Returns:
            A network of shared dendrites, where there was a place for them.
        """
        assert self._calls is not None
        calls, self._calls = self._calls, None
        form = calls.end()
        if form.around == [""] and calls_for_steps(trainer):
            form = Form(None, f"the model is one network, and {CALLED_FOR_STEPS}")
        self.settings = self.settings.settled(*form)
        if self.settings.form == "private":
            return None
        network = self._attach(trainer, trainer.lightning_module, None, before)
        calls.tell_neurons(network)
        return network
