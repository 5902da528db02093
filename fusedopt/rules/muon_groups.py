"""Which parameters of a model Muon is meant for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..protocol import Group

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# Names of an output layer, as models call it.
_HEADS = {
    *("head", "heads", "lm_head", "embed_out", "output", "output_layer", "classifier", "score", "unembed", "logits"),
    *("fc", "qa_outputs"),
}
_T = TypeVar("_T")
_NO_MATRICES = re.compile("embed|token|bias")  # in the names of parameters that are no layer's
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+")


def muon_groups(model: nn.Module, *, adamw: Iterable[str | nn.Module | Tensor] = (), **options: Any) -> list[Group]:
    """Sort the parameters of a model into two param groups of `Muon`: its matrices, and what AdamW's rule is to step.

    AdamW gets embeddings, the output layer, biases, everything without two dimensions larger than 1, the parameters of
    normalizations, and those of convolutions, whose last two dimensions are no matrix. Muon gets all others: the
    weights of hidden linear layers and attention, and batches of such, as of experts.

    Embeddings are known by their class, and parameters that are no layer's, such as ``pos_embed``, by their name. An
    output layer is known by its weight, if it is an embedding's too; by its shape, if it is the last
    ``torch.nn.Linear`` and shaped as an embedding; and by its name, such as ``lm_head`` or ``classifier``, unless it
    lies in one of repeated layers. Name in `adamw` what this does not find, and print the groups to see what it did::

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
        ValueError: a name in `adamw` is none of a module or parameter of the model, or a module or tensor is not in it.
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
        if isinstance(module, _CONVOLUTIONS) or module in heads or _is_head(name, module) or _is_norm(module):
            for_adamw |= set(map(id, module.parameters()))
    for_adamw |= {id(param) for param, name in named.items() if not _is_matrix(param, name)}
    groups: list[Group] = [{"params": [], "use_muon": True}, {"params": [], "use_muon": False, **options}]
    for param, name in reversed(list(named.items())):
        groups[id(param) in for_adamw]["params"].append((name, param))
    return [group for group in groups if group["params"]]


def _is_matrix(param: Tensor, name: str) -> bool:
    """Whether a parameter is a matrix, or a batch of some, by its shape and its own name."""
    return param.dim() > 1 and min(param.shape[-2:]) > 1 and not _NO_MATRICES.search(name.rpartition(".")[2])


def _is_head(name: str, module: nn.Module) -> bool:
    """Whether a module is an output layer by its name: a layer that is not repeated, or all of a part of the model."""
    path = _WRAPPERS.sub("", name).split(".")
    is_layer = isinstance(getattr(module, "weight", None), Tensor)
    return path[-1] in _HEADS and not any(map(str.isdigit, path)) and (is_layer or len(path) == 1)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _entries(adamw: Any) -> list[Any]:
    return [adamw] if isinstance(adamw, (str, nn.Module, Tensor)) else list(adamw)


def _by_both_names(named: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    """Those in a model, with and without the names of its wrappers."""
    whole = dict(named)
    return {**{_WRAPPERS.sub("", name): item for name, item in whole.items()}, **whole}


def _params_of(model: nn.Module, entry: Any) -> list[Tensor]:
    """The parameters that an entry of `adamw` names."""
    if not isinstance(entry, str):
        if not isinstance(entry, (nn.Module, Tensor)):
            raise TypeError(f"adamw takes names, modules and parameters, not {torch.typename(entry)}")
        mine: list[Tensor] = [entry] if isinstance(entry, Tensor) else list(entry.parameters())
        if not set(map(id, mine)) <= set(map(id, model.parameters())):
            raise ValueError(f"adamw has a {torch.typename(entry)} that is not in the model")
        return mine
    params = _by_both_names(model.named_parameters(remove_duplicate=False))
    modules = _by_both_names(model.named_modules(remove_duplicate=False))
    if entry in params:
        return [params[entry]]
    if entry not in modules:
        raise ValueError(f"adamw has {entry!r}, which is the name of no module and no parameter of the model")
    return list(modules[entry].parameters())
