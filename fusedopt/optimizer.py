"""The base class of every optimizer here, and of your own."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .declaration import argument_defaults, check_declaration
from .engines.choice import BACKENDS, engine, numba_is_installed, triton_is_installed, why_not
from .options import (
    SKIPPED_STEPS,
    begin_counters,
    check_group,
    check_torchs_flags,
    required_keys,
    settle_options,
    share_equal_tensors,
)
from .protocol import Group, Scalars, States
from .step import amp
from .step.coding import new_state
from .step.hooks import hooked_step
from .step.hyper import check_choices
from .step.sharding import is_flattened, is_sharded
from .stepper import Stepper
from .storage import precision
from .storage.averaging import check_not_swapped, swapped
from .storage.loading import shield, unshield_all
from .storage.states import without_unbegun


class FusedOptimizer(torch.optim.Optimizer):
    r"""An optimizer whose step is element-wise: one pass over memory where its kernels run, plain torch elsewhere.

    A subclass declares its names and says its equation twice, in the same words: here in torch, and in Triton in the
    module of `fusedopt.kernels.rules` that `kernel` names.

    Class attributes:
        kernel: module of ``fusedopt.kernels.rules`` with the functions ``scalars`` and ``update``, or these two
            functions themselves.
        hyperparameters: keys of a param group that the step reads, in the order in which `scalars` gets them. Numbers,
            one-element tensors, or pairs of them (``betas``), which take two places.
        options: keys of a param group that decide which states there are.
        optional: those of both that torch's class lacks, with their defaults. A group has such a key only where it
            differs, so that torch's checkpoints fit.
        choices: by those of `hyperparameters` that are names, the names to choose from. `scalars` gets the place of the
            one that was chosen: 0 for the first.
        scalar_states: names of the states that are one number a parameter (``step``).
        states: names of the states that are one number an element.
        always: names of those of both that every parameter keeps from its first step on, whatever the options. A state
            with only some of them is refused.
        nonnegative: names of those of `states` that have no negative element: 8 bits then hold no sign, and no element
            becomes 0.
        begun: by the name of a scalar state, that of the state of which it tells whether it has begun: it is 0 in the
            step that creates it. Such a number lies in no `state`, and is not saved.

    Args:
        params: parameters, named parameters or param groups, as for any ``torch.optim.Optimizer``.
        defaults: the default of every key of a param group.
        backend: ``"auto"`` runs Triton's kernels on parameters that lie on a GPU which Triton drives, the same kernels
            compiled by numba on those that lie on the CPU, if numba is there (``pip install fusedopt[cpu]``) and can
            compile the rule, and the reference on all others. ``"triton"`` and ``"compiled"`` insist on theirs,
            ``"eager"`` is the reference. For tensors on the CPU ``"triton"`` is Triton's interpreter, which
            ``TRITON_INTERPRET=1`` must have turned on. Not part of the ``state_dict``.
        state_dtype: the dtype in which states are created, fp32, bf16 or fp16; None means the parameter's. States that
            are there, or loaded, keep theirs. All arithmetic is in fp32 (fp64 for fp64 parameters). fp16 holds no
            square of a number beyond 255. ``"8bit"`` stores states in 8 bits, with a scale in fp32 for each block of
            256 elements; those that are there are converted, and are converted back where a group asks for something
            else. Parameters below 4,096 elements, sparse ones, and states for which `is_exact` is true keep their
            dtype.
        master_weights: keep an fp32 copy of each 16-bit parameter, which is updated; the parameter is its rounding.
            Where the parameter is not (somebody has written it since), the parameter counts.
        kahan: keep what rounding a 16-bit parameter lost, and add it at the next step.
        rounding: ``"nearest"``, or ``"stochastic"`` for states in 16 or 8 bits and for 16-bit parameters of which
            neither `master_weights` nor `kahan` keeps more: up or down, with the probabilities that make the mean
            right.
        seed: of stochastic rounding, in :math:`[0, 2^{64})`. The random numbers are a function of the seed, the place
            of the parameter among all of the optimizer's, the number of steps that the optimizer has taken, the state
            and the element: for a DTensor of which only rows are split, its place in the whole. The number of steps is
            saved, as a key of the param groups. Give different seeds to optimizers that step different parameters.
        max_grad_norm: at least 0. Multiply all gradients by ``min(1, max_grad_norm / (norm + 1e-6))``, as
            ``torch.nn.utils.clip_grad_norm_`` does, where the norm is that of the gradients of all parameters
            together, unscaled. The gradients themselves are not clipped. None does not clip.
        skip_nonfinite: leave everything as it is in a step for which any gradient has an infinite or NaN element.
        skip_grad_norm: at least 0. Leave everything as it is in a step whose norm, that of `max_grad_norm` before
            clipping, is above this, or for which any gradient has an infinite or NaN element. None does not ask.
        ema_decay: :math:`\delta \in [0, 1)` of an average of the weights, :math:`a \leftarrow \delta a +
            (1 - \delta) \theta`, which begins with the weights after the first step and goes on whenever its parameter
            steps. `swap_ema` evaluates with it. None keeps no average.

    `max_grad_norm`, `skip_grad_norm` and `ema_decay` may be one-element tensors, as every hyperparameter: a step reads
    what they hold then, and kernels wait for none that lies on a device. Such a one is not checked.

    For one group alone, or later, set an option by its key in the param group, which is its name after ``fusedopt_``:
    ``{"params": params, "fusedopt_ema_decay": 0.9}``. Keys without that prefix are yours, unless the class has an
    argument of that name. All but `backend` have such a key; `max_grad_norm`, `skip_nonfinite` and `skip_grad_norm` are
    the same in all groups. A group has the options that differ from their defaults, and the seed of stochastic
    rounding; where a loaded one has none, this optimizer's stay.

    ``torch.amp.GradScaler`` leaves unscaling and skipping to the step where kernels step all parameters, and no
    hook, no wrapper and no `step` of a subclass would see scaled gradients: by its attributes `grad_scale`, which the
    gradients are divided by, and `found_inf`, which skips the step unless it is 0. Both are one-element tensors; a step
    reads them where they are and waits for neither. With a `grad_scale`, a step that is taken leaves ``param.grad``
    unscaled, rounded to its dtype and not clipped: once where parameters share it, and in place, also where it is
    expanded. Only a DTensor's gradient whose placements are not its parameter's may stay scaled.

    Parameters may be DTensors. Their states are DTensors of the same placements, and a rank steps what it holds. Where
    a step asks for the norm of gradients or may be skipped, all ranks of their meshes must step, also those without
    elements or gradients; all take the same decision.

    In a CUDA graph the step is captured with the numbers, and for the parameters with gradients, of that moment. What
    is to change between replays must be a tensor on the device: any hyperparameter, such as `lr`, `weight_decay` or
    each of `betas`, and the three options above. Make a step before the capture, so that the states are there. The
    optimizer keeps what the graph reads as long as it lives.

    State:
        States in 8 bits are tensors that decode themselves for any operation of torch: they look like fp32
        (complex64), ``dequantize()`` returns such a tensor, and what is written into them is encoded.

        Beside those of the class, ``master_param`` (fp32) or ``kahan_comp`` (of the parameter's dtype) for 16-bit
        parameters; ``ema`` (of the parameter's dtype, fp32 for 16-bit ones, from the master weights or the compensated
        ones where they are kept).

    Raises:
        TypeError: the class does not declare what is asked for above, or its parts disagree; `seed` is no int;
            `max_grad_norm`, `skip_grad_norm` or `ema_decay` is no number, `skip_nonfinite` no bool.
        ValueError: unknown backend; ``"triton"`` or ``"compiled"`` for a parameter that it cannot step; options for low
            precision that are unknown, exclude each other, or have nothing to act on; `max_grad_norm`,
            `skip_grad_norm` or `ema_decay` outside its range; `max_grad_norm`, `skip_nonfinite` or `skip_grad_norm` not
            the same in all groups; a name that is none of `choices`.
        RuntimeError: ``differentiable=True``; ``fused`` and ``foreach`` both true; ``backend="triton"`` without
            Triton, ``backend="compiled"`` without numba.
    """

    kernel: ClassVar[Any]
    hyperparameters: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    scalar_states: ClassVar[tuple[str, ...]] = ()
    states: ClassVar[tuple[str, ...]] = ()
    always: ClassVar[tuple[str, ...]] = ()
    nonnegative: ClassVar[tuple[str, ...]] = ()
    begun: ClassVar[dict[str, str]] = {}

    backend: str
    _stepper: Stepper
    _steps_in_backward: Any  # the StepInBackward that takes them
    _opt_called: bool
    _origin: tuple[int, int, int]  # group, position and index of the first parameter in a whole optimizer

    profile_hook_step = staticmethod(hooked_step)  # type: ignore[assignment]  # torch puts it around each class's step

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # An object of torch's class can become one of this without its __init__. The class itself must not have
            # these: Lightning's wrappers pose as subclasses, and ask the optimizer for what they do not find.
            if name == "_stepper":
                return self.__dict__.setdefault(name, Stepper())
            try:
                return _UNSET[name]
            except KeyError:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        *,
        backend: str = "auto",
        state_dtype: torch.dtype | str | None = None,
        master_weights: bool = False,
        kahan: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        max_grad_norm: float | Tensor | None = None,
        skip_nonfinite: bool = False,
        skip_grad_norm: float | Tensor | None = None,
        ema_decay: float | Tensor | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"Invalid backend: {backend!r}, choose one of {', '.join(map(repr, BACKENDS))}")
        if backend == "triton" and not triton_is_installed():
            raise RuntimeError("backend='triton' needs Triton, which is not installed; 'auto' runs without it")
        if backend == "compiled" and not numba_is_installed():
            raise RuntimeError("backend='compiled' needs numba (pip install fusedopt[cpu]); 'auto' runs without it")
        if backend in ("triton", "compiled") and defaults.get("fused") is False:
            raise ValueError(f"fused=False asks for the reference, {backend=} for kernels: choose one")
        check_declaration(type(self), FusedOptimizer, defaults)
        self.backend = backend
        self._stepper = Stepper()
        common = {
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "kahan": kahan,
            "rounding": rounding,
            "seed": seed,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "skip_grad_norm": skip_grad_norm,
            "ema_decay": ema_decay,
            "backend": backend,  # for `type(optimizer)(params, **optimizer.defaults)`
        }
        super().__init__(params, {**defaults, **common})
        precision.check_effect(self)

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        """What an update needs beside its tensors, computed once for each parameter and step in float64.

        Args:
            hyper: the numbers that `hyperparameters` names.
            scalar_states: the numbers that `scalar_states` names; 1.0 for one that the options leave out.

        Returns:
            The scalars, and the new scalar states.
        """
        raise NotImplementedError

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        """The update in plain torch: write `param` and `states` in place, leave `grad` as it is.

        All tensors are real and of one dtype, fp32 or fp64: other dtypes are converted before and after.

        Args:
            param: the parameter.
            grad: its gradient, of the same shape.
            states: the tensors that `states` names, None for one that the options leave out.
            scalars: what `scalars` returned.
        """
        raise NotImplementedError

    def uses(self, name: str, group: Group) -> bool:
        """Whether the options of a group call for the state `name`."""
        return True

    def is_exact(self, name: str, group: Group) -> bool:
        """Whether 8 bits are never enough for the state `name`, which then keeps its dtype."""
        return False

    @staticmethod
    def settle_group(group: Group, index: int) -> None:
        """Check a group, and add the keys that follow from others, such as the `max_lr` of a form of weight decay.

        Called for a new group, and for all groups in a step before which keys, flags, names or ones of `optional` have
        changed. A key that is there must stay as it is. Where a checkpoint lacks one, it follows from the loaded ones.
        Called with copies of all groups, only to check them, in a step before which parameters or states have moved.

        Args:
            group: to be completed in place.
            index: of the group, for a message.
        """

    def product(self, group: Group) -> Any:
        """What is done to the direction of a group's matrices before they take it, None for an element-wise group.

        Where it is not None, `direction` and `descent` of the class and of its kernels step a parameter in place of
        `reference` and `update`: `Muon` tells how.
        """
        return None

    def init_state(self, param: Tensor, state: dict[str, Any], group: Group) -> None:
        """Create the states that a parameter lacks: 0 for each number, zeros for each tensor."""
        for name in self.scalar_states:
            if self.uses(name, group):
                state.setdefault(name, 0.0)
        for name in self.states:
            if self.uses(name, group) and state.get(name) is None:
                state[name] = new_state(self, name, param, group)

    def check_sparse(self, group: Group, name: str) -> None:
        """Raise unless a step can use a sparse gradient."""
        raise RuntimeError(f"{type(self).__name__} does not support sparse gradients ({name} has one)")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.

        Raises:
            RuntimeError: a gradient or state does not fit its parameter, or a state lacks what the class always keeps.
            ValueError, TypeError: an option that was set since is one that the constructor would have refused;
                `max_grad_norm`, `skip_nonfinite` or `skip_grad_norm` for pieces of ``FullyShardedDataParallel``'s
                parameters.

        Nothing has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _untraced(_step, self) if torch.compiler.is_compiling() else _step(self)
        return loss

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, unscaled and before clipping: 0-d, fp64, where the step ran.

        None unless `max_grad_norm`, `skip_nonfinite` or `skip_grad_norm` asked for it.
        """
        return self._stepper.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps skipped themselves, on GradScaler's word or by their own: 0-d, int64, where they ran.

        With `skip_nonfinite` or `skip_grad_norm` it is saved, as a key of the param groups.
        """
        counts = [group[SKIPPED_STEPS] for group in self.param_groups if SKIPPED_STEPS in group]
        count = counts[0] if counts else self._stepper.skipped_steps
        return count if isinstance(count, Tensor) else torch.tensor(count, device="cpu")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch.amp.GradScaler asks before it leaves unscaling and skipping to the step.

        Where parameters are DTensors, the step asks all ranks whether to skip, in kernels or not. GradScaler does not.
        FSDP1's ShardedGradScaler does, which it must not leave to the step.
        """
        asker = sys._getframe(1)
        if amp.is_clipper(asker):
            return False
        if self._steps_in_backward:
            raise RuntimeError(amp.NOT_IN_BACKWARD)
        if not amp.steps_by_itself(asker, self, _PLAIN_STEP):
            return False
        params = [param for group in self.param_groups for param in group["params"]]
        if any(map(is_flattened, params)):
            return False
        return any(map(is_sharded, params)) or "eager" not in self._stepper.engines(self)

    def swap_ema(self) -> AbstractContextManager[None]:
        """Within the context, every parameter has the value of its average, and the average that of its parameter.

        Only values are exchanged, so nothing has to be told to the model. In the end everything is as it was, bit for
        bit. A parameter of another dtype than its average gets the rounded average, which stays where it is, beside a
        copy of the parameter. A parameter that has never stepped has no average, and keeps its value.

        Raises:
            RuntimeError: no group has an `ema_decay`; within the context, for `step`, `state_dict`, `load_state_dict`
                and another `swap_ema`.
        """
        return swapped(self)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group``."""
        own = set(param_group) if isinstance(param_group, dict) else set()
        count = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            settle_options(self, self.param_groups[-1], own)
            self._check_group(count)
            begin_counters(self.param_groups[-1])
            if self._steps_in_backward is not None:
                self._steps_in_backward.refresh()
        except Exception:
            del self.param_groups[count:]
            for key in param_group.keys() - own if own else ():
                del param_group[key]  # which torch has put there, and which are no options of this group
            raise

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        check_torchs_flags(group, type(self).__name__)
        check_group(self.param_groups, index)
        check_choices(self.choices, group, index)
        self.settle_group(group, index)
        for position, param in enumerate(group["params"]):
            why = why_not(self.backend, param)
            if why is not None:
                raise ValueError(f"backend={self.backend!r} cannot step parameter {position} of group {index}: {why}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also one that ``torch.optim`` saved.

        Unlike torch's, this keeps the dtype and the bits of every tensor, copies them (later steps leave `state_dict`
        alone), and keeps this optimizer's options where the loaded groups have none, and its `fused` in any case.
        """
        check_not_swapped(self, "load_state_dict")
        # Last of the hooks, so that it sees what the user's have made of the dict.
        hook = self.register_load_state_dict_pre_hook(shield)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        share_equal_tensors(self.param_groups)
        self._stepper.skipped_steps = self._stepper.rounding_step = 0  # unless loaded groups have them

    def state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim.Optimizer.state_dict`` returns it, without states of which no step was taken."""
        check_not_swapped(self, "state_dict")
        if not self._stepper.may_skip:
            return super().state_dict()
        hook = self.register_state_dict_post_hook(without_unbegun, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        check_not_swapped(self, "a copy")
        return {**super().__getstate__(), "backend": self.backend, "_stepper": copy.copy(self._stepper)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        unshield_all(state.get("state", {}), self)
        super().__setstate__(state)
        self._stepper.forget()
        declared = argument_defaults(type(self))
        if "differentiable" not in declared:
            self.defaults.pop("differentiable", None)  # which torch puts there, also for a class that has no such flag
        self.defaults.update({**declared, **self.defaults})
        for group in self.param_groups:
            for key, default in required_keys(self).items():
                group.setdefault(key, default)

    def __repr__(self) -> str:
        counts = Counter(engine(self, group, param) for group in self.param_groups for param in group["params"])
        total = counts.total()
        parts = [name if count == total else f"{name} for {count} of {total}" for name, count in counts.items()]
        runs = ", ".join(parts) or "eager"
        if self.backend == "auto" and "eager" in counts and not numba_is_installed():
            runs += "; pip install fusedopt[cpu] makes steps on a CPU faster"
        head, _, rest = super().__repr__().partition("\n")
        return f"{head}\nbackend: {runs} ({self.backend!r} asked for)\n{rest}"


@torch._disable_dynamo  # torch.compiler.disable would import dynamo and Triton as soon as fusedopt is imported
def _untraced(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_PLAIN_STEP = FusedOptimizer.step  # before torch puts hooks around it


def _step(optimizer: FusedOptimizer) -> None:
    optimizer._stepper.step(optimizer)  # `_stepper` is looked up in here, since that may make one


_UNSET = {"backend": "auto", "_steps_in_backward": None, "_origin": (0, 0, 0)}
