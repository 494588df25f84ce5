"""What the processes of a run tell each other: sums, who begins, who ended it and why.

Their process groups are made here and given to nobody: torch.distributed's default group stays empty, so that Unsloth,
accelerate and TRL each see one process on one GPU, as they do without a launcher. What is shared is summed in
train/across_ranks.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore  # where mypy finds them

from toolkit import world as processes
from toolkit.errors import EXIT_USER, EndedByAnother, Interrupted, UserError, exit_code
from toolkit.world import OneOf, World

CONNECT_SECONDS, BEGIN_SECONDS, LINK_SECONDS = 60, 600, 180
LONGEST_STEP = timedelta(
    hours=1
)  # that one process waits for another in a sum; the dead are noticed otherwise
BROKEN_SECONDS = 3  # until it is known why a connection broke
FIRST_SPEAKS_SECONDS = 1  # all of them often fail alike: the first process has the whole report
GRACE_SECONDS = 5  # between the end of the run and that of a process that hangs in a sum
POLL_SECONDS = 0.05
BUCKET = 2**23  # numbers that are summed at once: 32 MiB in fp32


WhenCutOff = Callable[[int, str], object]


def _say_nothing(code: int, reason: str) -> None: ...


class Ranks(OneOf):
    """One process alone: it has nobody to tell anything."""

    rank, size = 0, 1

    def begin(self, facts: dict[str, Any], when_cut_off: WhenCutOff = _say_nothing) -> dict[str, Any]:
        """What the first process has to say, {name: JSON}, to all of them, once it may write.

        `when_cut_off` is told exit code and reason, should this process have to be ended where it hangs.
        """
        return facts

    def connect(self) -> None:
        """Makes sure that all can sum what is on their devices. Raises UserError when they can't in LINK_SECONDS."""

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over the processes; the same bits in all."""
        return list(values)

    def largest(self, value: float) -> float:
        return value

    def gather(self, thing: Any) -> list[Any]:
        """What each process calls with, as JSON, by rank."""
        return [thing]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces tensors by their sums over the processes, the same bits in all."""

    def agree(self, what: str, value: Any) -> None:
        """Raises UserError naming the processes that have another value than the first."""

    def meet(self, seconds: float = math.inf) -> None:
        """Waits until all are here; a signal ends it. Raises UserError when they are not after so many seconds."""

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The block in the first process, then in the first of each other machine, then in the rest: what one of them
        writes to a cache the others find there."""
        yield

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """What ends the block in one process ends the run in all; one of them says why."""
        yield


ALONE = Ranks()


@dataclass(frozen=True)
class End:
    """Why the run ended: an error of the process `rank`, which says it, or the death of another, which `rank` saw."""

    rank: int
    code: int
    reason: str
    of_another: bool = False


class LaunchedRanks(Ranks):
    """Several processes, connected through a store of keys and values at the address that the launcher named.

    A thread watches for the end of the run: said by another, or by the kernel when one on this machine dies. Whoever
    hangs in a sum then is ended GRACE_SECONDS later.
    """

    def __init__(self, world: World, device: torch.device):
        self.rank, self.size = world.rank, world.size
        self._when_cut_off: WhenCutOff = _say_nothing
        self._world, self._device = world, device
        self._store = _store(world)
        self._meetings = 0
        self._sums: Any = None
        self._gradients: Any = None
        self._limit: tuple[float, str] | None = None
        self._is_leaving = threading.Event()
        self._store.set(f"process/{self.rank}", json.dumps({"pid": os.getpid(), "machine": _machine()}))
        processes.tell_by(self._told)
        threading.Thread(target=self._watch, daemon=True, name="watches the other ranks").start()

    # How it begins

    def begin(self, facts: dict[str, Any], when_cut_off: WhenCutOff = _say_nothing) -> dict[str, Any]:
        self._when_cut_off = when_cut_off
        if self.is_first:
            self._store.set("begun", json.dumps(facts))
            return facts
        self._wait(
            lambda: self._store.check(["begun"]),
            BEGIN_SECONDS,
            "the first process did not begin the run",
        )
        found: dict[str, Any] = json.loads(self._store.get("begun"))
        return found

    def connect(self) -> None:
        self.meet(BEGIN_SECONDS)  # a cold disk may keep one of them minutes from importing its libraries
        self._limit = (time.monotonic() + LINK_SECONDS, self._unreachable("no answer"))
        try:
            self._sums = dist.ProcessGroupGloo(
                PrefixStore("gloo", self._store), self.rank, self.size, LONGEST_STEP
            )
            self._gradients = self._sums
            if self._device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = LONGEST_STEP
                self._gradients = dist.ProcessGroupNCCL(
                    PrefixStore("nccl", self._store), self.rank, self.size, options
                )
            ones = torch.ones(1, device=self._device)
            self.add_up([ones])
            assert ones.item() == self.size
        except RuntimeError as error:
            raise UserError(self._unreachable(str(error).partition("\n")[0])) from error
        finally:
            self._limit = None

    def _unreachable(self, why: str) -> str:
        what = "NCCL" if self._device.type == "cuda" else "gloo"
        return (
            f"process {self.rank} of {self.size} cannot sum with the others over {what} within {LINK_SECONDS} s "
            f"({why}): name the network interface that connects the machines with NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME; on cards without peer-to-peer access NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO says more"
        )

    # What they sum and tell

    def sum(self, *values: float) -> list[float]:
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        return self._reduced([value], dist.ReduceOp.MAX)[0]

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)
        self._reduce(self._sums, numbers, how)
        found: list[float] = numbers.tolist()
        return found

    def _reduce(self, group: Any, tensor: torch.Tensor, how: Any) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = how
        group.allreduce([tensor], options).wait()

    def gather(self, thing: Any) -> list[Any]:
        text = torch.frombuffer(bytearray(json.dumps(thing).encode()), dtype=torch.uint8)
        longest = int(self.largest(len(text)))
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
        padded[: len(text)] = text
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._sums.allgather([found], [padded]).wait()
        return [json.loads(bytes(one.numpy())) for one in found]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            self._reduce(self._gradients, flat, dist.ReduceOp.SUM)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            torch._foreach_copy_([tensor.detach().view(-1) for tensor in bucket], list(parts))

    def agree(self, what: str, value: Any) -> None:
        found = self.gather([value, socket.gethostname()])
        others = [
            f"process {rank} on {host}: {other}"
            for rank, (other, host) in enumerate(found)
            if other != found[0][0]
        ]
        if others:
            raise UserError(
                f"the processes of this run do not agree on {what}. The first on {found[0][1]}: {found[0][0]}; "
                f"{'; '.join(others[:4])}"
            )

    def meet(self, seconds: float = math.inf) -> None:
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        self._store.add(key, 1)
        self._wait(lambda: self._store.add(key, 0) == self.size, seconds, "not all processes came together")

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        own = 0 if self.is_first else 1 if self._world.local_rank == 0 else 2
        for turn in range(3):
            if turn == own:
                yield
            self.meet()

    def _wait(self, happened: Callable[[], bool], seconds: float, late: str) -> None:
        """In Python, so that a signal is heard."""
        deadline = time.monotonic() + seconds
        while not happened():
            if end := self._end():
                raise EndedByAnother(end.code, end.reason)
            if time.monotonic() > deadline:
                raise UserError(f"{late} within {seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    # How it ends

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            told = self._as_told(error)
            if told is error:
                raise
            raise told from error

    def leave(self) -> None:
        """This process needs the others no more."""
        self._is_leaving.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            if _opened:  # the others' last word is in this process
                others = [f"left/{rank}" for rank in range(self.size) if rank != self.rank]
                deadline = time.monotonic() + GRACE_SECONDS
                while not self._store.check(others) and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
            if self._sums:
                self._sums.shutdown()  # else its threads outlive the interpreter, which aborts
        if self._gradients is not self._sums:  # NCCL's end may wait for a process that is no more
            end = threading.Thread(target=self._gradients.abort, daemon=True, name="ends NCCL")
            end.start()
            end.join(GRACE_SECONDS)
        self._gradients = self._sums = None

    def _as_told(self, error: BaseException) -> BaseException:
        """The error as this process has to end with it: its own, or that another one said why the run ended."""
        self._is_leaving.set()  # nobody has to end this process any more
        if isinstance(error, EndedByAnother):
            return error
        is_clear = isinstance(error, (UserError, Interrupted, KeyboardInterrupt))
        wait = BROKEN_SECONDS if not is_clear else 0 if self.is_first else FIRST_SPEAKS_SECONDS
        try:
            end = self._await_end(wait) or self._post(
                End(self.rank, exit_code(error), str(error) or type(error).__name__)
            )
        except RuntimeError:  # the store is gone, and with it whoever could have said something
            return error if is_clear else UserError(self._store_gone)
        if end.rank != self.rank:
            return EndedByAnother(end.code, end.reason)
        return UserError(end.reason) if end.of_another else error

    def _told(self, error: BaseException) -> int | None:
        told = self._as_told(error)
        return told.code if isinstance(told, EndedByAnother) else None

    def _await_end(self, seconds: float) -> End | None:
        deadline = time.monotonic() + seconds
        while not (end := self._end()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return end

    def _end(self, store: Any = None) -> End | None:
        store = store or self._store
        return End(**json.loads(store.get("end"))) if store.check(["end"]) else None

    def _post(self, end: End, store: Any = None) -> End:
        """What is known as the end from now on: this, or what another said before."""
        return End(**json.loads((store or self._store).compare_set("end", "", json.dumps(asdict(end)))))

    @property
    def _store_gone(self) -> str:
        return (
            f"the processes lost each other: the one behind {self._world.address}:{self._world.port} ended without a "
            "word, as by kill -9; the same command continues from the last checkpoint"
        )

    # Who watches

    def _watch(self) -> None:
        try:
            end = self._watched(_store(self._world))
        except (RuntimeError, UserError):
            end = End(-1, EXIT_USER, self._store_gone)
        if end is None or self._is_leaving.wait(GRACE_SECONDS):
            return
        with contextlib.suppress(Exception):
            self._when_cut_off(end.code, end.reason)
        if end.rank == self.rank or (end.rank < 0 and self.is_first):
            os.write(2, f"error: {end.reason}\n".encode())
        os._exit(end.code)

    def _watched(self, store: Any) -> End | None:
        """The end of the run, as soon as there is one; None when this process leaves before."""
        alive, poll = dict[int, int](), select.poll()
        unknown = set(range(self.size)) - {self.rank}
        while not self._is_leaving.is_set():
            for rank in [rank for rank in unknown if store.check([f"process/{rank}"])]:
                unknown.remove(rank)
                other = json.loads(store.get(f"process/{rank}"))
                if other["machine"] != _machine():
                    continue
                try:
                    descriptor = os.pidfd_open(other["pid"])
                except ProcessLookupError:
                    self._mourn(store, rank)
                except OSError:  # a kernel that has no such thing: a broken connection tells, later
                    continue
                else:
                    alive[descriptor] = rank
                    poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll(500):
                poll.unregister(descriptor)
                os.close(descriptor)
                self._mourn(store, alive.pop(descriptor))
            if end := self._end(store):
                return end
            if self._limit and time.monotonic() > self._limit[0]:
                return self._post(End(self.rank, EXIT_USER, self._limit[1]), store)
        return None

    def _mourn(self, store: Any, rank: int) -> None:
        if not store.check([f"left/{rank}"]) and not self._end(store):
            reason = (
                f"process {rank} of {self.size} on {socket.gethostname()} was killed from outside (kill -9, or the "
                "kernel when the RAM ran out), which ends the run; the same command continues from the last checkpoint"
            )
            self._post(End(self.rank, EXIT_USER, reason, of_another=True), store)


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[Ranks]:
    """The processes of the world, connected for the block.

    Raises UserError where the store cannot be reached.
    """
    if world.is_alone:
        yield ALONE
        return
    ranks = LaunchedRanks(world, device)
    try:
        with ranks.as_one():
            yield ranks
    finally:
        ranks.leave()


def encoded(data: bytes) -> str:
    """Bytes as `gather` takes them."""
    return base64.b85encode(data).decode()


def decoded(text: str) -> bytes:
    return base64.b85decode(text)


def _store(world: World) -> Any:
    opens = world.is_first and not world.launcher_holds_store
    try:
        store = TCPStore(
            world.address,
            world.port,
            is_master=opens and not _opened,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
        )
    except RuntimeError as error:
        raise UserError(
            f"process {world.rank} of {world.size} cannot reach the store at {world.address}:{world.port} within "
            f"{CONNECT_SECONDS} s: start all machines with the same --master_addr and --master_port, and open that "
            f"port between them ({str(error).partition(chr(10))[0]})"
        ) from None
    if opens:
        _opened.append(store)  # its server lives as long as this process
    return PrefixStore(f"toolkit/{world.attempt}", store)


_opened: list[Any] = []


def _machine() -> str:
    """Tells apart what cannot see each other's processes: machines, and containers on one."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """In order, of up to BUCKET numbers each, or one larger tensor."""
    bucket, held = list[torch.Tensor](), 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
