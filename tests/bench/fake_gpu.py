"""A GPU that is not there: its time is told, its memory is the CPU's, its kernels run in the interpreter."""

import dataclasses
from types import SimpleNamespace

from bench.steps import machine


class FakeGpu:
    """As much of torch.cuda as the benchmarks use. The clocks of host and device go on only when they are told to."""

    def __init__(self, free=2**34):
        self.host = 0.0
        self.device = 0.0  # when the device will be done with everything that it was asked for
        self.free = free
        self.Event = lambda enable_timing: Event(self)

    def work(self, host, device):
        """A call that takes the host so long, and the device."""

        def call():
            self.host += host
            self.device = max(self.device, self.host) + device

        return call

    def synchronize(self, device=None):
        self.host = max(self.host, self.device)

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1024)

    def mem_get_info(self, device):
        return self.free, self.free

    def empty_cache(self):
        pass

    def reset_peak_memory_stats(self, device):
        pass

    def memory_allocated(self, device):
        return 100

    def max_memory_allocated(self, device):
        return 123


class Event:
    def __init__(self, gpu):
        self._gpu = gpu

    def record(self):
        self._gpu.work(1e-6, 0)()
        self.time = self._gpu.device

    def query(self):
        return self._gpu.host >= self.time

    def synchronize(self):
        self._gpu.synchronize()

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


def fake_machine(device, free=2**34):
    """Measures as on a GPU, on whatever there is. Every call makes 2 launches, and takes 23 bytes."""

    def launches(call):
        call()
        return 2

    made = machine.gpu(device, FakeGpu(free), launches, backend="triton")
    made.stopwatch.most = 1  # its clock never tells it to stop
    return dataclasses.replace(made, rounds=2)
