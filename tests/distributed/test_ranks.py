"""What other tests rely on: a failing rank is an error at once, and the next test finds new ranks."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, on_one_worker, on_ranks, run_on_ranks


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("this rank is wrong")
    dist.barrier()  # for which nobody comes


def add_ranks():
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    assert total == 1


@on_one_worker
def test_a_failing_rank_ends_all():
    run_on_ranks(2, add_ranks)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1.*fail_on_rank_1.*this rank is wrong"):
        run_on_ranks(2, fail_on_rank_1)
    assert time.monotonic() - start < 10
    run_on_ranks(2, add_ranks)


@on_ranks(4)
def test_every_rank_runs():
    assert dist.get_world_size() == 4
