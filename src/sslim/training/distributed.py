"""Several processes under ``torchrun``: who is who, and the few things they tell each other."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_ELEMENTS = 8 * 2**20  # gradients that travel together: 32 MB of float32
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of this run; the default is one alone.

    Attributes:
        rank: This process.
        world_size: All of them.
        local_rank: This process on its machine; chooses the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @staticmethod
    def of_environment() -> Processes:
        """Tells who this process is from what ``torchrun`` sets; alone without it."""
        rank, world_size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        return Processes(rank=rank, world_size=world_size, local_rank=local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds a tensor up over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, values: list[float], device: torch.device) -> list[float]:
        """Returns the largest of each value over the processes."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Returns every process's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Returns the main process's value."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with the main process's, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Adds gradients up over the processes, in place; a parameter that no process has a gradient for keeps none.

        DistributedDataParallel would do this while the backward pass still runs, but wants every parameter in every step, which
        layer drop and sampled subnets break, and every trained layer inside one ``forward``. Once a step, for models of this
        size, waiting costs a few per cent at most.
        """
        if self.world_size == 1:
            return
        present = self.maximum([p.grad is not None for p in parameters], parameters[0].device)
        gradients = []
        for parameter in (p for p, anywhere in zip(parameters, present, strict=True) if anywhere):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            pieces = flat.split([gradient.numel() for gradient in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    def wait(self) -> None:
        """Waits until all have come here."""
        if self.world_size > 1:
            dist.barrier()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups neighbours of one type up to ``BUCKET_ELEMENTS``."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def pick_device(name: str, processes: Processes) -> torch.device:
    """Turns ``auto``, ``cpu`` or ``cuda`` into this process's device.

    Raises:
        ValueError: Another name, or CUDA is asked for and missing.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r} is not one of 'auto', 'cpu', 'cuda'")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda' is asked for, but torch finds no CUDA device; use 'cpu' or 'auto'")
    return torch.device("cuda", processes.local_rank)


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Joins the other processes that ``torchrun`` started; alone without it.

    Args:
        device: As for ``pick_device``; CUDA uses NCCL, the CPU gloo.
    """
    processes = Processes.of_environment()
    if processes.world_size == 1:
        yield processes
        return
    place = pick_device(device, processes)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # This module's default arguments hold the process group that exists when it is first imported (by torch.optim, for one).
    # Then gloo's threads outlive destroy_process_group, and now and then abort the interpreter when it ends.
    importlib.import_module("torch.distributed.nn")

    store, rank, world_size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a group with the addresses in it, and a second group of the same processes would find the first
    # one's there. So every group has keys of its own, by how often its processes have joined.
    joined = store.add(f"sslim/joined/{rank}", 1)
    backend, own = "nccl" if place.type == "cuda" else "gloo", dist.PrefixStore(f"sslim/{joined}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def on_main(work: Callable[[], Any]) -> Any:
    """Does something on the main process alone; the others wait, however long it takes, and get what it returned.

    For what comes before, between and after trainings: choosing, cutting, timing, writing. The processes need not be joined for
    it, so no time limit of a process group counts. All of them have to come here equally often.

    Args:
        work: Returns plain JSON values.

    Raises:
        Exception: What ``work`` raises, on the main process; ``torchrun`` then ends the others.
    """
    processes = Processes.of_environment()
    if processes.world_size == 1:
        return work()
    store, rank, _ = next(dist.rendezvous("env://"))
    key = f"sslim/main/{store.add(f'sslim/turns/{rank}', 1)}"
    if processes.is_main:
        store.set(key, json.dumps(work()))
    while not store.check([key]):
        time.sleep(POLL_S)
    return json.loads(store.get(key))
