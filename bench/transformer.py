"""The small transformer that bench/train_fsdp.py and bench/eight_bits.py train, and the text that it learns.

The text, read byte by byte, is that of the licences and descriptions of whatever Python packages are installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

BYTES = 256
CONTEXT = 64
MOST_TEXT = 1 << 20


class Block(nn.Module):
    """Attention to the bytes so far, and two layers that see one byte."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.from_heads(heads.transpose(1, 2).flatten(2))
        return x + self.layers(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.scores(self.norm(x))


def find_text() -> bytes:
    """Licences and descriptions of the installed packages, in the order of their names."""
    found = {}
    for package in metadata.distributions():
        paths = [path for path in package.files or () if "LICENSE" in path.name.upper() and path.suffix != ".py"]
        texts = [package.read_text("METADATA") or ""]
        texts += [path.locate().read_text(errors="ignore") for path in paths if Path(path.locate()).is_file()]
        found[package.name] = "\n".join(texts)
    return "\n".join(found[name] for name in sorted(found)).encode()[:MOST_TEXT]


def as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batches(text: Tensor, steps: int, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of the text from random places, and the bytes that come next."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (size, 1), generator=generator).to(text.device)
        pieces = text[starts + torch.arange(CONTEXT + 1, device=text.device)]
        yield pieces[:, :-1], pieces[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """In nats a byte."""
    return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
