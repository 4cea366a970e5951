"""An exchange between threads, for what processes exchange while they calibrate together."""

import threading
from types import SimpleNamespace


class Threads:
    """Threads in place of processes: each gets the values of all."""

    def __init__(self, number):
        self.values, self.barrier = [None] * number, threading.Barrier(number, timeout=60)

    def exchange(self, rank):
        return SimpleNamespace(rank=rank, gather=lambda values: self.gather(rank, values))

    def gather(self, rank, values):
        self.values[rank] = values
        self.barrier.wait()
        found = [value.clone() for value in self.values]
        self.barrier.wait()
        return found
