"""Muon, with AdamW for the parameters that are no matrices of hidden layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..matrices.batches import Product
from ..matrices.newton_schulz import NAMED, QUINTIC, Coefficients, NewtonSchulz
from ..optimizer import FusedOptimizer
from ..options import CommonOptions, is_default, is_number
from ..protocol import Group, Scalars, States
from . import decay
from .adam import Adam
from .checks import check_betas, lies_on_device

ADJUST_LR_FNS = (None, "original", "match_rms_adamw", "spectral_unclamped")
MOST_STEPS = 99
NORM_EPS, ADAMW_EPS = 1e-7, 1e-8
NAMED_AT_MOST = 10  # parameters in a message


class Muon(FusedOptimizer):
    r"""Muon: the momentum of a matrix, orthogonalized. What is no matrix of a hidden layer steps by AdamW.

    .. math::
        B &\leftarrow \mu B + (1 - \mu) G \\
        D &= B, \quad \text{with Nesterov's momentum } D = (1 - \mu) G + \mu B \\
        O &= \mathrm{NS}_k(D) \approx U V^T \quad \text{where } D = U \Sigma V^T \\
        \Theta &\leftarrow (1 - \eta\lambda)\Theta - \eta\, s\, O

    :math:`\mathrm{NS}_k` are :math:`k` Newton-Schulz iterations in bf16, which bring all singular values near to 1:
    :math:`X \leftarrow X / \max(\lVert X \rVert_F, \epsilon)` and then :math:`X \leftarrow aX + (bA + cA^2)X` with
    :math:`A = XX^T`. Zero gradients give zero updates. Drop-in for ``torch.optim.Muon`` (that of 2.15, which leaves a
    bf16 momentum as it is).

    A step is one pass that writes the momenta and, in bf16, the directions of all matrices, batched products, one batch
    for each shape, and one pass that takes the results from the parameters. The number of launches does not depend on
    the number of matrices. `FusedOptimizer`'s options apply to these passes.

    A parameter of shape ``[..., M, N]`` is a batch of matrices, such as one of experts. A group with
    ``use_muon=False`` steps by `AdamW`'s rule, in the same ``prepare``: give it the parameters for which Muon is not
    meant, embeddings, the output layer, biases, norms and convolutions. `muon_groups` sorts those of a model.

    The matrices of DTensors may be cut along one dimension of their mesh, as by ``fully_shard``, also of HSDP, or by
    tensor parallelism; others may replicate them, or cut a batch into whole matrices. Each rank then orthogonalizes
    some whole matrices, about as much as the others, and all ranks of that dimension must step, with gradients for the
    same parameters.

    Jordan et al., `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et al., `Muon is Scalable for LLM Training
    <https://arxiv.org/abs/2502.16982>`_, 2025; Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_,
    2025; Bernstein, `Deriving Muon <https://jeremybernste.in/writing/deriving-muon>`_, 2025.

    Args:
        params: parameters, named parameters or param groups; of two or more dimensions where `use_muon` is true.
        lr: :math:`\eta \ge 0`, a number or a one-element tensor.
        weight_decay: :math:`\lambda \ge 0`, decoupled from the gradient.
        momentum: :math:`\mu \ge 0`.
        nesterov: use Nesterov's momentum.
        ns_coefficients: :math:`(a, b, c)` of all iterations; or a sequence of triples, one for each, of which the last
            is repeated; or ``"polar_express"``, those of Amsel et al., which bring small singular values faster to 1
            and all of them closer.
        eps: :math:`\epsilon \ge 0`, below which norms count as this; no tensor on a device. In a group with
            ``use_muon=False`` it is AdamW's, and 1e-8 if the group is given none.
        ns_steps: :math:`k`, from 0 to 99.
        adjust_lr_fn: :math:`s` of a matrix of shape :math:`M \times N`. None and ``"original"``:
            :math:`\sqrt{\max(1, M / N)}`; ``"match_rms_adamw"``: :math:`0.2\sqrt{\max(M, N)}`, with which learning rate
            and weight decay of AdamW fit; ``"spectral_unclamped"``: :math:`\sqrt{M / N}`.
        use_muon: false for AdamW's rule. Meant as a key of param groups.
        betas: AdamW's, in :math:`[0, 1)`. Meant as a key of param groups with ``use_muon=False``.
        split: orthogonalize pieces of each matrix by themselves, as of a weight of queries, keys and values, or of
            heads: into how many equal pieces the rows divide, or pieces of which sizes. None does not divide. Meant as
            a key of param groups.
        split_dim: -2 divides rows, the outputs of ``torch.nn.Linear``; -1 divides columns.
        weight_decay_form: how much a step takes of a parameter beside its update: one of the names that `Adam` lists.
        max_lr: :math:`\eta_{max} > 0` of these forms, as for `Adam`.
        **common: what every optimizer takes, ``backend`` and those for low precision: see `FusedOptimizer`.

    State:
        ``momentum_buffer`` :math:`B`, of the parameter's shape and `state_dtype`; that of `AdamW` in groups with
        ``use_muon=False``.

    Memory:
        Beside the states, 2 bytes an element of all matrices of this rank for their directions, and for the largest
        batch as much again, with two squares of the shorter side of each of its matrices (of at most 2^27 elements at
        a time). 2 more for those that are padded or divide along what is no row in memory, where sides count as
        multiples of 8. Of matrices
        that are cut between ranks, twice 2 bytes for each element that a rank holds, and 2 for those that it
        orthogonalizes; 2 more for batches, and where other than rows lie together. With `step_in_backward`, parameters
        of one shape have all this in common.

    Raises:
        ValueError: an argument outside its range; a parameter of fewer than two dimensions where `use_muon` is true;
            `split` does not fit one.
        RuntimeError: in ``step``, for complex parameters and sparse gradients, and for DTensors that are cut in another
            way.
    """

    kernel = "muon"
    hyperparameters = ("lr", "weight_decay", "momentum", "nesterov", "betas", "eps", *decay.OPTIONAL)
    options = ("use_muon", "ns_coefficients", "ns_steps", "adjust_lr_fn", "split", "split_dim")
    optional: ClassVar[dict[str, Any]] = {
        "use_muon": True,
        "betas": (0.9, 0.999),
        "split": None,
        "split_dim": -2,
        **decay.OPTIONAL,
    }
    choices = decay.CHOICES
    scalar_states = ("step",)
    states = ("exp_avg", "exp_avg_sq", "momentum_buffer")
    always = ("step", "exp_avg", "exp_avg_sq")  # of AdamW's groups
    nonnegative = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float | Tensor = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | Sequence[tuple[float, float, float]] | str = QUINTIC,
        eps: float | Tensor = NORM_EPS,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        use_muon: bool = True,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        split: int | Sequence[int] | None = None,
        split_dim: int = -2,
        weight_decay_form: str = "standard",
        max_lr: float | Tensor | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:  # with torch's words for this class
            raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
        if not momentum >= 0.0:
            raise ValueError(f"momentum should be >= 0 but is: {momentum}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight decay should be >= 0 but is: {weight_decay}")
        check_betas(betas)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "use_muon": use_muon,
            "betas": betas,
            "split": split,
            "split_dim": split_dim,
            "weight_decay_form": weight_decay_form,
            "max_lr": max_lr,
        }
        super().__init__(params, defaults, **common)
        if is_default(betas, self.optional["betas"]):
            del self.defaults["betas"]  # where they are, schedulers turn them, and not the momentum

    def add_param_group(self, param_group: Group) -> None:
        use_muon = self.defaults.get("use_muon", True)  # an object of torch's class has no such default
        if isinstance(param_group, dict) and not param_group.get("use_muon", use_muon):
            given = not use_muon and self.defaults["eps"] != NORM_EPS
            eps = self.defaults["eps"] if given else ADAMW_EPS  # the default is that of the norms of matrices
            param_group = {"eps": eps, **param_group}
        super().add_param_group(param_group)

    @staticmethod
    def settle_group(group: Group, index: int) -> None:
        decay.settle(group, index)
        product = _product(group, f" of group {index}")
        if product is None:
            return
        names = group.get("param_names") or [None] * len(group["params"])
        named = [
            (f"parameter {position} of group {index}" + f" ({name!r})" * bool(name), tuple(param.shape))
            for position, (name, param) in enumerate(zip(names, group["params"], strict=False))
            if isinstance(param, Tensor)  # the step refuses what is none
        ]
        _check_dims(named)
        for name, shape in named:
            _check_split(shape, product, name)

    def product(self, group: Group) -> Product | None:
        return _product(group, "")

    def uses(self, name: str, group: Group) -> bool:
        return (name == "momentum_buffer") == bool(group.get("use_muon", True))

    def init_state(self, param: Tensor, state: dict[str, Any], group: Group) -> None:
        if param.is_complex() and group.get("use_muon", True):
            raise RuntimeError("Muon does not support complex parameters")
        super().init_state(param, state, group)

    @staticmethod
    def scalars(hyper: Scalars, scalar_states: Scalars) -> tuple[Scalars, Scalars]:
        lr, weight_decay, momentum, nesterov, beta1, beta2, eps, form, max_lr = hyper
        hyper_of_adam = (lr, beta1, beta2, eps, weight_decay, 0.0, 1.0, form, max_lr)
        scalars_of_adam, scalar_states = Adam.scalars(hyper_of_adam, scalar_states)
        scalars_of_muon = (1 - momentum, momentum if nesterov else 1.0, lr)
        return scalars_of_adam + scalars_of_muon, scalar_states  # Adam's ten come first, as its functions take them

    @staticmethod
    def direction(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        """The direction of a matrix, in place of `param`, and its momentum."""
        momentum_weight, lean, _ = scalars[10:]
        momentum_buffer = states[2]
        momentum_buffer.lerp_(grad, momentum_weight)
        param.copy_(grad.lerp(momentum_buffer, lean))

    @staticmethod
    def descent(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        """The update of a matrix, where `grad` is its orthogonalized direction."""
        factor, opposed, lr = scalars[2], scalars[3], scalars[12]
        decay.decay_(param, grad, factor, opposed)
        param.add_(grad, alpha=-lr)

    @staticmethod
    def reference(param: Tensor, grad: Tensor, states: States, scalars: Scalars) -> None:
        """AdamW's update."""
        exp_avg, exp_avg_sq, _ = states
        Adam.reference(param, grad, (exp_avg, exp_avg_sq, None), scalars[:10])


def _product(group: Group, of_group: str) -> Product | None:
    """What the keys of a group say about its matrices, None where it steps by AdamW's rule."""
    use_muon = group.get("use_muon", True)
    if use_muon not in (True, False):
        raise TypeError(f"use_muon{of_group} must be True or False, but it is {use_muon!r}")
    if not use_muon:
        return None
    steps, eps, adjust_lr_fn = group["ns_steps"], group["eps"], group["adjust_lr_fn"]
    if not _is_count(steps, least=0):
        raise ValueError(f"ns_steps{of_group} must be an integer that is not negative, but it is {steps!r}")
    if steps > MOST_STEPS:
        raise ValueError(f"Number of steps must be less than {MOST_STEPS + 1} for computational efficiency")
    if adjust_lr_fn not in ADJUST_LR_FNS:
        raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
    if lies_on_device(eps) or not (eps.numel() == 1 if isinstance(eps, Tensor) else is_number(eps)):
        raise TypeError(f"eps{of_group} must be one number, in a tensor only on the CPU, but it is {eps!r}")
    if not 0 <= float(eps) < math.inf:
        raise ValueError(f"eps{of_group} should be >= 0 but is: {eps}")
    split, split_dim = group.get("split"), group.get("split_dim", -2)
    if split_dim not in (-2, -1):
        raise ValueError(f"split_dim{of_group} must be -2 for rows or -1 for columns, but it is {split_dim!r}")
    if split is not None:
        sizes = (split,) if not isinstance(split, Sequence) else tuple(split)
        if not sizes or not all(_is_count(size, least=1) for size in sizes):
            raise ValueError(f"split{of_group} must be a positive integer or sizes that are, but it is {split!r}")
        split = split if isinstance(split, int) else sizes
    iterations = NewtonSchulz.of(_coefficients(group["ns_coefficients"]), steps, float(eps))
    return Product(iterations, adjust_lr_fn, split, split_dim)


def _coefficients(value: Any) -> Coefficients | str:
    if isinstance(value, str):
        if value not in NAMED:
            raise ValueError(f"ns_coefficients must be numbers or one of {', '.join(map(repr, NAMED))}, not {value!r}")
        return value
    values = list(value) if isinstance(value, Iterable) else []
    triples = [values] if values and all(map(is_number, values)) else values
    if not triples or not all(map(_is_triple, triples)):
        raise ValueError("Coefficients must be a tuple of exactly 3 values")
    return tuple((float(a), float(b), float(c)) for a, b, c in triples)


def _is_triple(value: Any) -> bool:
    numbers = list(value) if isinstance(value, Iterable) else []
    return len(numbers) == 3 and all(is_number(number) and math.isfinite(number) for number in numbers)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_dims(named: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    others = [f"{name} of shape {shape}" for name, shape in named if len(shape) < 2]
    if others:
        listed = "; ".join(others[:NAMED_AT_MOST]) + f"; and {len(others) - NAMED_AT_MOST} more" * (
            len(others) > NAMED_AT_MOST
        )
        raise ValueError(
            f"Muon orthogonalizes matrices, but was given {listed}: put what is no matrix into a group with "
            "use_muon=False, which steps by AdamW's rule. fusedopt.muon_groups(model) sorts all parameters"
        )


def _check_split(shape: tuple[int, ...], product: Product, name: str) -> None:
    length, split = shape[product.split_dim], product.split
    if split is not None and (length % split if isinstance(split, int) else sum(split) != length):
        what = "rows" if product.split_dim == -2 else "columns"
        raise ValueError(f"split={split!r} does not divide {name}: its shape is {shape}, hence it has {length} {what}")
