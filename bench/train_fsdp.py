"""A small transformer learns text on several ranks, sharded by FSDP2, once with fusedopt and once with torch.optim.

    torchrun --nproc-per-node 2 bench/train_fsdp.py
    torchrun --nproc-per-node 2 bench/train_fsdp.py --optimizer muon

Runs on GPUs with NCCL if every rank has one, else on CPUs with gloo. Both sides begin with the same weights, get the
same batches and clip gradients by the norm of the whole model, so that the two curves coincide but for rounding.

With Muon the hidden matrices step by Muon and all else by AdamW. torch.optim.Muon takes no DTensors: its side trains
the whole model on every rank, with DistributedDataParallel, and two optimizers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # torchrun starts a file, not a module

import fusedopt
from bench.demo import BLUE, ORANGE, Parser, backend_of, writable_file
from bench.transformer import Transformer, as_tensor, batches, find_text, loss_of

BATCH_SIZE = 16  # of each rank
WIDTH, HEADS, LAYERS = 96, 4, 2
ADAMW = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
MUON = {"lr": 0.02, "weight_decay": 0.1}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}
MAX_GRAD_NORM = 0.5
REPORTED = 10  # how often the table and the figure show the loss, in parts of the run


@dataclass
class Run:
    """What one training leaves behind."""

    backend: str
    losses: list[float] = field(default_factory=list)  # of every step, over all ranks
    step_times: list[float] = field(default_factory=list)  # seconds, clipping included
    test_loss: float = float("nan")


def load_text(device: torch.device) -> Tensor:
    """The same bytes on all ranks, those that the first one finds."""
    found = [find_text() if dist.get_rank() == 0 else b""]
    dist.broadcast_object_list(found, device=device)
    return as_tensor(found[0]).to(device)


def batches_of_rank(text: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Other ones on each rank."""
    return batches(text, steps, seed * dist.get_world_size() + dist.get_rank(), BATCH_SIZE)


def mean_over_ranks(losses: Iterable[Tensor]) -> list[float]:
    stacked = torch.stack(list(losses)).detach()
    dist.all_reduce(stacked)
    return (stacked / dist.get_world_size()).tolist()


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def prepare(
    library: str, model: nn.Module, mesh: DeviceMesh, name: str
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The model as it is trained, and its optimizers."""
    if name == "muon":
        if library == "fusedopt":
            model = sharded(model, mesh)
            return model, [fusedopt.Muon(fusedopt.muon_groups(model, **ADAMW), max_grad_norm=MAX_GRAD_NORM, **MUON)]
        matrices, others = (group["params"] for group in fusedopt.muon_groups(model))
        return DistributedDataParallel(model), [torch.optim.Muon(matrices, **MUON), torch.optim.AdamW(others, **ADAMW)]
    model = sharded(model, mesh)
    if library == "fusedopt":
        return model, [fusedopt.AdamW(model.parameters(), max_grad_norm=MAX_GRAD_NORM, **ADAMW)]
    return model, [torch.optim.AdamW(model.parameters(), **ADAMW)]


def train(library: str, text: Tensor, mesh: DeviceMesh, options: argparse.Namespace) -> Run:
    """Train a new model with the optimizers of this library."""
    torch.manual_seed(options.seed)
    model = Transformer(WIDTH, HEADS, LAYERS).to(text.device)
    model, optimizers = prepare(library, model, mesh, options.optimizer)
    run = Run(backend_of(optimizers[0]))
    train_text, test_text = text[: -len(text) // 10], text[-len(text) // 10 :]
    losses = []
    for batch in tqdm(
        batches_of_rank(train_text, options.steps, options.seed),
        library,
        total=options.steps,
        unit="step",
        disable=dist.get_rank() != 0,
    ):
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.detach())
        wait(text.device)
        start = time.perf_counter()
        if library != "fusedopt":
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for optimizer in optimizers:
            optimizer.step()
        wait(text.device)
        run.step_times.append(time.perf_counter() - start)
        for optimizer in optimizers:
            optimizer.zero_grad()
    run.losses = mean_over_ranks(losses)
    with torch.no_grad():
        run.test_loss = statistics.mean(
            mean_over_ranks(loss_of(model, batch) for batch in batches_of_rank(test_text, 20, options.seed + 1))
        )
    return run


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(ours: Run, theirs: Run) -> str:
    """The loss at some steps, each the mean of those since the last one."""
    part = max(1, len(ours.losses) // REPORTED)
    ends = range(part, len(ours.losses) + 1, part)
    rows = [[end, *(f"{statistics.mean(run.losses[end - part : end]):.4f}" for run in (ours, theirs))] for end in ends]
    rows.append(["test", *(f"{run.test_loss:.4f}" for run in (ours, theirs))])
    rows.append(["step (ms)", *(f"{1000 * statistics.median(run.step_times):.2f}" for run in (ours, theirs))])
    headers = ["steps", f"fusedopt ({ours.backend})", "torch.optim"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right"))


def draw(ours: Run, theirs: Run, title: str, path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.plot(ours.losses, color=ORANGE, linewidth=4, label=f"fusedopt ({ours.backend})")
    panel.plot(theirs.losses, color=BLUE, linewidth=1.2, linestyle=(0, (5, 3)), label="torch.optim")
    panel.set_xlabel("step")
    panel.set_ylabel("training loss (nats a byte)")
    panel.set_title(title, loc="left", fontsize=10)
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def start_process_group() -> torch.device:
    """Where this rank computes."""
    local_rank, local_size = (int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if torch.cuda.device_count() >= local_size:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    dist.init_process_group("gloo")
    return torch.device("cpu")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="bench/train_fsdp.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="that both sides use (default: %(default)s)")
    add("--steps", type=int, default=300, metavar="N", help="of each training (default: %(default)s)")
    add("--out", type=writable_file, default="train-fsdp.png", metavar="PNG", help="the figure (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: %(default)s)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("argument --steps: must be at least 1")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 bench/train_fsdp.py")
    return options


def main() -> None:
    """Train twice, print and draw."""
    options = parse_arguments()
    device = start_process_group()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    text = load_text(device)
    ours, theirs = (train(library, text, mesh, options) for library in ("fusedopt", "torch.optim"))
    if dist.get_rank() == 0:
        where = f"{dist.get_world_size()} ranks on {device.type}, {dist.get_backend()}, torch {torch.__version__}"
        optimizer = OPTIMIZERS[options.optimizer]
        print(f"\n{where}; {len(text):,} bytes of text; {optimizer}, gradients clipped to {MAX_GRAD_NORM}")
        if options.optimizer == "muon":
            print("torch.optim.Muon takes no DTensors: its model is not sharded, but a DistributedDataParallel.")
        print(table(ours, theirs))
        print("Loss in nats a byte, the mean of the steps since the row above; median time of clipping and step.")
        print(f"The test losses differ by {abs(ours.test_loss - theirs.test_loss):.4f}.")
        draw(ours, theirs, where, options.out)
        print(f"Loss curves: {options.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
