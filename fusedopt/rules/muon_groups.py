"""Which parameters of a model Muon is meant for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..protocol import Group

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# The last part of the name of an output layer, as models call it.
_HEADS = {"head", "lm_head", "heads", "embed_out", "output", "output_layer", "classifier", "score", "unembed", "logits"}


def muon_groups(model: nn.Module, *, adamw: Iterable[str | nn.Module | Tensor] = (), **options: Any) -> list[Group]:
    """Sort the parameters of a model into two param groups of `Muon`: its matrices, and what AdamW's rule is to step.

    AdamW gets embeddings, the output layer, biases and everything else of fewer than two dimensions, the parameters of
    normalizations, and those of convolutions, whose last two dimensions are no matrix. Muon gets all others: the
    weights of hidden linear layers and attention, and batches of such, as of experts. An output layer is known by its
    weight, if it is an embedding's too; by its shape, if it is the last ``torch.nn.Linear`` and shaped as an embedding;
    and by its name, such as ``lm_head`` or ``classifier``. Name in `adamw` what this does not find, and print the
    groups to see what it did::

        groups = fusedopt.muon_groups(model, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01)
        optimizer = fusedopt.Muon(groups, lr=0.02)

    A tied parameter is listed once. Parameters that do not require gradients are left out.

    Args:
        model: the module, also within a wrapper, compiled, or sharded by ``fully_shard``.
        adamw: more of AdamW's: parameters, modules with all that they have, or names of either in `model`.
        **options: keys of AdamW's group, such as `lr`, `betas` and `weight_decay`. Those that are missing are the
            optimizer's own, `eps` is 1e-8.

    Returns:
        The group of Muon and that of AdamW, of named parameters; a group without any is left out.

    Raises:
        ValueError: a name in `adamw` is none of a module or parameter of the model, or a tensor none of its
            parameters.
        TypeError: `adamw` has something else.
    """
    named = {param: name for name, param in reversed(list(model.named_parameters())) if param.requires_grad}
    for_adamw = {id(param) for entry in _entries(adamw) for param in _params_of(model, entry)}
    tables = [
        param for module in model.modules() if isinstance(module, _TABLES) for param in module.parameters(recurse=False)
    ]
    for_adamw |= set(map(id, tables))
    shapes = {tuple(param.shape) for param in tables}
    # Only the last one: a hidden layer may have the shape of a table of positions by chance.
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    heads = [linear for linear in last if tuple(linear.weight.shape) in shapes]
    for name, module in model.named_modules():
        is_head = name.rpartition(".")[2] in _HEADS or module in heads
        if isinstance(module, _CONVOLUTIONS) or is_head or _is_norm(module):
            for_adamw |= set(map(id, module.parameters()))
    groups: list[Group] = [{"params": [], "use_muon": True}, {"params": [], "use_muon": False, **options}]
    for param, name in reversed(list(named.items())):
        groups[param.dim() < 2 or id(param) in for_adamw]["params"].append((name, param))
    return [group for group in groups if group["params"]]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _entries(adamw: Any) -> list[Any]:
    return [adamw] if isinstance(adamw, (str, nn.Module, Tensor)) else list(adamw)


def _params_of(model: nn.Module, entry: Any) -> list[Tensor]:
    """The parameters that an entry of `adamw` names."""
    if isinstance(entry, nn.Module):
        return list(entry.parameters())
    if isinstance(entry, Tensor):
        if not any(entry is param for param in model.parameters()):
            raise ValueError("adamw has a tensor that is no parameter of the model")
        return [entry]
    if not isinstance(entry, str):
        raise TypeError(f"adamw takes names, modules and parameters, not {torch.typename(entry)}")
    found = dict(model.named_parameters(remove_duplicate=False)).get(entry)
    if found is not None:
        return [found]
    module = dict(model.named_modules(remove_duplicate=False)).get(entry)
    if module is None:
        raise ValueError(f"adamw has {entry!r}, which is the name of no module and no parameter of the model")
    return list(module.parameters())
