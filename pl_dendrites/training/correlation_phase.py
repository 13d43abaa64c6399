"""One correlation phase under a Trainer: the network stands still, the candidates learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.core.growth.sharded import is_sharded, reshard
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.rule.processes import JointLearning
from pl_dendrites.training.optimizers import in_turn
from pl_dendrites.training.own_gradients import OwnGradients
from pl_dendrites.training.processes import Processes
from pl_dendrites.training.stand_still import StandStill
from pl_dendrites.training.trainer import gradient_scaler, loss_scale

__all__ = ["CorrelationPhase", "adam"]


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of candidates where the user names none: Adam with learning rate 0.01.

    A pool has several times the parameters of its layer, so its step is worth the fused kernel: on a CPU it takes a
    fourth of the time.

    Args:
        parameters: of the candidates.
    """
    parameters = list(parameters)
    return torch.optim.Adam(parameters, lr=0.01, fused=all(p.device.type in ("cpu", "cuda") for p in parameters))


class CorrelationPhase:
    """Starts candidates, steps them with an optimizer of their own, and puts the Trainer back afterwards.

    Args:
        trainer: the Trainer, in the middle of a fit.
        network: the network that grows.
        pool: candidates per neuron.
        seed: for the candidates' initial weights.
        batches: steps of the model's optimizer in whose place the candidates take one, with all their gradients; the
            last batch of an epoch leaves none for the next.
        optimizer: makes their optimizer; ``None``: Adam with learning rate 0.01.
        validate: whether the Trainer goes on to validate.
        whole_epoch: whether the phase begins with an epoch's first batch.
        values: what the network's parameters and buffers are, by name, where somebody keeps them.
        resumed: a :meth:`state_dict` to go on from; ``None``: a new phase.

    Attributes:
        whole_epoch: whether candidates have seen the running epoch from its first batch on. A part of one neither
            counts nor is it measured by.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        network: DendriticNetwork,
        *,
        pool: int,
        seed: int,
        batches: int = 1,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        validate: bool = True,
        whole_epoch: bool = True,
        values: Mapping[str, Any] | None = None,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        reshard(network.model)
        # Flags of parameters that are shared out must not change from batch to batch.
        self._thaws = not is_sharded(network.model)
        # A generator of its own: the user's random numbers stay what they are without dendrites.
        network.start_candidates(
            pool,
            torch.Generator().manual_seed(seed),
            trainable=None if resumed is None else resumed["trainable"],
            state=None if resumed is None else resumed["candidates"],
            values=values if self._thaws else None,
        )
        network.listen(False, frozen=not self._thaws)
        self._network, self._make_optimizer = network, adam if optimizer is None else optimizer
        self.whole_epoch, self._batches, self._waiting = whole_epoch, batches, 0
        try:
            self._take_parameters()
            if resumed is not None:
                self._resume(resumed)
        except BaseException:
            network.discard()
            raise
        self._stand_still, self._optimizers = StandStill(trainer, validate), trainer.optimizers
        self._own_gradients: OwnGradients | None = None
        if self._thaws:
            needed = resumed is not None and bool(resumed.get("own_gradients"))
            thaw = partial(network.listen, True, frozen=False)
            self._own_gradients = OwnGradients(trainer.lightning_module, thaw, needed)
        self._processes = Processes(trainer)
        self._joint: JointLearning | None = None
        if self._processes.count > 1 and network.candidates:
            pools, all_of_them = network.candidates.values(), self._processes
            self._joint = JointLearning(pools, all_of_them.add_up, all_of_them.count, all_of_them.gather)
            if resumed is not None:
                self._joint.load_gradients(resumed.get("summed", []))
        self._backward_seen = False
        self._trainer_scale = partial(loss_scale, trainer)
        self._manual = not trainer.lightning_module.automatic_optimization

    def _take_parameters(self) -> None:
        # In float16 the square of a small gradient is zero, and Adam divides by its root: half precision is for the
        # forward pass, and a step is computed in single.
        parameters = self._network.candidate_parameters()
        stepped = [
            p if p.dtype == torch.promote_types(p.dtype, torch.float32) else nn.Parameter(p.detach().float())
            for p in parameters
        ]
        self._half = [(half, single) for half, single in zip(parameters, stepped, strict=True) if half is not single]
        self._single = stepped
        # Shared dendrites are found in samples, and nothing of them learns here.
        self._optimizer = self._make_optimizer(stepped or [nn.Parameter(torch.zeros(0))])

    def _resume(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self.whole_epoch, self._waiting = state.get("whole_epoch", True), state.get("waiting", 0)
        parameters = self._network.candidate_parameters()
        for kind, own in (("gradients", parameters), ("summed", parameters), ("single", [s for _, s in self._half])):
            _check_shapes(kind, own, state.get(kind, []))
        for parameter, gradient in zip(parameters, state.get("gradients", []), strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device, parameter.dtype, copy=True)
        for half, single in self._half:
            single.data.copy_(half)
        for (_, single), value in zip(self._half, state.get("single", []), strict=False):
            single.data.copy_(value)

    def keep_strongest(self, whole_epoch: bool) -> None:
        """Let candidates see their strongest inputs alone from now on. Their optimizer begins anew.

        Args:
            whole_epoch: whether an epoch's first batch is about to come.
        """
        if self._network.keep_strongest():
            self._take_parameters()
        self._network.reset_correlations()
        self.whole_epoch = whole_epoch

    def begin_epoch(self) -> None:
        """An epoch's first batch is about to come."""
        self._network.hold_still(compare=True)
        self._network.reset_correlations()
        self.whole_epoch = True

    def rose(self, min_delta: float) -> bool:
        """Whether the best correlation of any neuron rose by a share, in any process.

        Where processes are not alike, what each computes of gathered samples may differ in the last bits.

        Args:
            min_delta: the share.
        """
        return self._processes.any(self._network.correlation_rose(min_delta))

    @property
    def learning_rate(self) -> float:
        """Of the candidates, or the first of them if their optimizer has several."""
        return float(self._optimizer.param_groups[0]["lr"])

    def begin_batch(self) -> None:
        """Listen from now on; what the model did to itself since the last batch is undone.

        Steps since then are forgotten: saving a sharded model may step an optimizer, to see what it remembers.
        """
        self.hold_still()
        own = self._own_gradients
        self._network.listen(True, frozen=own is None or not own.needed)
        self._stand_still.stepped = False

    def begin_backward(self, loss: Tensor) -> None:
        """Let the error be seen by those layers alone whose weights this backward pass would train.

        And let it run where no candidate reaches the loss: the rest is frozen, and that is no mistake.

        Args:
            loss: where it begins.
        """
        if not loss.requires_grad:
            loss.requires_grad_(True)
        self._network.watch(in_turn(self._stand_still.toggled, self._optimizers, self._network))
        self._network.scale_loss(self._trainer_scale())

    def end_backward(self) -> None:
        """Learn from what this backward pass showed to all processes together."""
        self._backward_seen = True
        if self._joint is not None:
            self._joint.learn()
        self._network.scale_loss(None)  # a model under manual optimization may call `loss.backward()` past Lightning

    def end_batch(self, trainer: pl.Trainer) -> None:
        """Step the candidates if the model's optimizer would have stepped in this batch."""
        self.hold_still()
        if self._joint is not None and not self._backward_seen:
            self._joint.learn()  # past Lightning, too
        self._network.listen(False, frozen=not self._thaws)
        if self._own_gradients is not None:
            self._own_gradients.clear()
        self._backward_seen = False
        self._waiting += self._stepped()
        if self._waiting < (1 if trainer.is_last_batch else self._batches):
            return
        self._waiting = 0
        if self._joint is not None:
            self._joint.add_up_gradients()
        self._to_single()
        gradients = [p.grad for p in self._single if p.grad is not None]
        scaler = gradient_scaler(trainer)
        if scaler is None or not gradients:
            for gradient in gradients:
                # An error that is not finite counts as none, but none times an input that is not finite is NaN.
                gradient.nan_to_num_(0.0, 0.0, 0.0)
            self._optimizer.step()
        else:
            self._step_scaled(scaler)
        self._optimizer.zero_grad()
        self._to_half()

    @torch.no_grad()
    def _to_single(self) -> None:
        for half, single in self._half:
            single.grad, half.grad = None if half.grad is None else half.grad.float(), None

    @torch.no_grad()
    def _to_half(self) -> None:
        for half, single in self._half:
            half.copy_(single)

    def _stepped(self) -> bool:
        # A model that steps its optimizers itself may pass one over in one process and not in another.
        stepped, self._stand_still.stepped = self._stand_still.stepped, False
        return self._processes.any(stepped) if self._manual else stepped

    def _step_scaled(self, scaler: torch.amp.GradScaler) -> None:
        # The scaler belongs to this optimizer now: a scale that overflows must come down here as in a base phase.
        scaler.unscale_(self._optimizer)
        if self._network.missed_error():
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        else:
            scaler.step(self._optimizer)
            scaler.update()

    def end(self) -> None:
        """Give the Trainer back its optimizers; candidates that nobody integrated go."""
        self._stand_still.release()
        if self._own_gradients is not None:
            self._own_gradients.release()
        self._network.discard()

    def begin_validation(self) -> None:
        """The network that is validated is the one that stands still."""
        self._network.hold_still(compare=True)

    def end_validation(self) -> None:
        """What a validation changes is the user's own affair: a threshold that it finds, say."""
        self._network.adopt()

    def hold_still(self) -> None:
        """Put back what moves though no optimizer steps: the model's buffers, and schedulers that it steps itself."""
        self._network.hold_still()
        self._stand_still.hold()

    def save_beside(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Put into a checkpoint what stands still, as it does. Nothing moves: a backward pass may be yet to come."""
        self._stand_still.hold()
        held = self._network.held()
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = {key: held.get(key, value) for key, value in checkpoint["state_dict"].items()}
        checkpoint["lr_schedulers"] = self._stand_still.scheduler_states()
        checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]

    def state_dict(self, together: bool = True) -> dict[str, Any]:
        """Candidates, their optimizer, gradients that wait for a step, and which parameters are trainable but for this.

        Args:
            together: whether all processes call this. If not, gradients and samples of some of them are left out.
        """
        gradients = [parameter.grad for parameter in self._network.candidate_parameters()]
        summed: list[Tensor | None] = []
        if self._joint is not None:
            gradients, summed = [], self._joint.gradients() if together else []
        return {
            "candidates": self._network.candidate_state(together),
            "optimizer": self._optimizer.state_dict(),
            "trainable": self._network.trainable,
            "whole_epoch": self.whole_epoch,
            "own_gradients": self._own_gradients is not None and self._own_gradients.needed,
            "waiting": self._waiting,
            "gradients": [None if gradient is None else gradient.detach().clone() for gradient in gradients],
            "summed": [None if gradient is None else gradient.detach().clone() for gradient in summed],
            "single": [single.detach().clone() for _, single in self._half],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned in this phase."""
        self._network.load_candidate_state(state["candidates"])
        self._resume(state)


def _check_shapes(kind: str, own: Sequence[Tensor], saved: Sequence[Tensor | None]) -> None:
    shapes = [tuple(tensor.shape) for tensor in own]
    if saved and (
        len(saved) != len(shapes)
        or any(value is not None and tuple(value.shape) != shape for value, shape in zip(saved, shapes, strict=True))
    ):
        raise ValueError(f"the saved candidates' {kind} belong to others: there are parameters of {shapes}")
