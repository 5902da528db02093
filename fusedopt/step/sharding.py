"""DTensors: what this rank holds of a parameter, its gradient and its states. The step works on that alone.

Steps are element-wise, so a rank steps its own elements and talks to nobody. A DTensor is opened by its attributes,
which costs no dispatch; torch.distributed.tensor is imported by those who make DTensors, never from here.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, however it is placed."""
    dtensor = _dtensor()
    return dtensor is not None and isinstance(tensor, dtensor)


def is_flattened(param: Tensor) -> bool:
    """Whether a parameter is a piece of one of FullyShardedDataParallel's, which does not say what other ranks hold."""
    is_piece = hasattr(param, "_fsdp_flattened") and torch.distributed.is_initialized()
    return is_piece and torch.distributed.get_world_size() > 1


def check_whole(params: Sequence[Tensor], name_of: Callable[[int], str]) -> None:
    """Raise for a parameter of which the ranks do not know each other's gradients. Arguments as of `local_grads`."""
    for index, param in enumerate(params):
        if is_flattened(param):
            raise ValueError(
                f"max_grad_norm, skip_nonfinite and skip_grad_norm are about whole gradients, but {name_of(index)} is "
                "what this rank holds of a parameter of FullyShardedDataParallel: clip with model.clip_grad_norm_, or "
                "use torch.distributed.fsdp.fully_shard"
            )


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    held: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    if type(held) is not Tensor and hasattr(held, "trigger_wait"):  # a collective still writes it
        held = held.trigger_wait()
    return held


def spec_of(tensor: Tensor) -> Any:
    """The object that says how a DTensor lies on its mesh, None for other tensors."""
    return getattr(tensor, "_spec", None) if is_sharded(tensor) else None


def like(held: Tensor, param: Tensor) -> Tensor:
    """A DTensor that lies as `param` does, of which this rank holds `held`."""
    spec = copy.copy(spec_of(param))
    spec.tensor_meta = spec.tensor_meta._replace(dtype=held.dtype)
    return type(param)(held, spec, requires_grad=False)  # type: ignore[call-overload]


def lies_as(tensor: Tensor, param: Tensor) -> bool:
    """Whether the ranks hold the same elements of both, which may be DTensors or not."""
    spec, wanted = spec_of(tensor), spec_of(param)
    return spec is wanted or (
        None not in (spec, wanted) and spec.placements == wanted.placements and spec.mesh == wanted.mesh
    )


def place(tensor: Tensor) -> str:
    """How a tensor lies, for messages."""
    spec = spec_of(tensor)
    if spec is None:
        return f"a plain {'Tensor' if isinstance(tensor, torch.nn.Parameter) else type(tensor).__name__}"
    return f"a DTensor with placements {spec.placements} on {spec.mesh}"


def opened(tensors: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """`local` and `spec_of` of many tensors, at a fraction of the price."""
    dtensor = _dtensor()
    sharded = {kind for kind in set(map(type, tensors)) if dtensor is not None and issubclass(kind, dtensor)}
    if not sharded:
        return list(tensors), [None] * len(tensors)
    held = [tensor._local_tensor if type(tensor) in sharded else tensor for tensor in tensors]
    if any(hasattr(kind, "trigger_wait") for kind in set(map(type, held))):
        held = list(map(local, tensors))
    return held, [tensor._spec if type(tensor) in sharded else None for tensor in tensors]


def local_grads(params: Sequence[Tensor], name_of: Callable[[int], str]) -> list[Tensor | None]:
    """What this rank holds of each gradient, distributed as its parameter.

    A gradient with other placements is redistributed for this step, which takes all ranks of its mesh: call this once
    in a step. The parameter's own gradient stays as it is.

    Args:
        params: the parameters.
        name_of: what messages call a parameter, by its place in `params`.

    Raises:
        RuntimeError: only one of parameter and gradient is a DTensor, or they lie on different meshes.
    """
    grads = [getattr(param, "grad", None) for param in params]  # what is no tensor is found later
    held, specs = opened(grads)
    _, wanted = opened(params)
    for index, (spec, of_param) in enumerate(zip(specs, wanted, strict=True)):
        grad = grads[index]
        if spec is not of_param and grad is not None:
            held[index] = local(_redistributed(params[index], grad, name_of, index))
    return held


def check_placements(param: Tensor, name: str) -> None:
    """Raise for a parameter that only all ranks together know."""
    placements = getattr(spec_of(param), "placements", ())
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(f"{name} has placements {placements}: a partial sum cannot be stepped")


def first_element(param: Tensor) -> int:
    """How many elements of a parameter come before those of this rank: where its random numbers begin.

    Where only the rows are split, as by FSDP, that is their place in the whole parameter, so that the numbers do not
    depend on how many ranks there are. Other shards are lined up one after the other, in the order of the mesh: the
    numbers of all elements differ, and replicas have the same.
    """
    spec = spec_of(param)
    coordinate = None if spec is None else spec.mesh.get_coordinate()
    if coordinate is None:
        return 0
    split = [
        (placement, spec.mesh.size(dim), coordinate[dim])
        for dim, placement in enumerate(spec.placements)
        if not placement.is_replicate()
    ]
    shape = list(param.shape)
    if all(type(placement).__name__ == "Shard" and placement.dim == 0 for placement, _, _ in split):
        first, rows = 0, shape[0] if shape else 1
        for _, size, place in split:
            chunk = -(-rows // size)
            start = torch.sym_min(place * chunk, rows)
            first, rows = first + start, torch.sym_min(chunk, rows - start)
        return first * math.prod(shape[1:])
    shard = 0
    for placement, size, place in split:
        shard = shard * size + place
        shape[placement.dim] = -(-shape[placement.dim] // size)
    return shard * math.prod(shape)


def _redistributed(param: Tensor, grad: Tensor, name_of: Callable[[int], str], index: int) -> Tensor:
    if lies_as(grad, param) and grad.shape == param.shape:
        return grad
    name = name_of(index)
    check_placements(param, name)
    if grad.shape != param.shape:
        raise RuntimeError(f"{name} has shape {tuple(param.shape)}, but its gradient has {tuple(grad.shape)}")
    why = f"{name} is {place(param)}, but its gradient is {place(grad)}"
    if None in (spec_of(param), spec_of(grad)) or spec_of(param).mesh != spec_of(grad).mesh:
        raise RuntimeError(why)
    try:
        with torch.no_grad():
            return grad.redistribute(placements=spec_of(param).placements)  # type: ignore[attr-defined]
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise RuntimeError(f"{why}, which torch cannot redistribute") from error


def _dtensor() -> Any:
    """The class, None as long as nobody has imported it: then there is no DTensor."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
