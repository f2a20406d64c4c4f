"""Work that several processes share, on one machine or on many that see one file system, without a coordinator.

Every piece of work leaves a file in place, whole, under a name that all agree on. Who begins a piece leaves a lease
beside it, and touches that while it works; who meets one goes on to the next piece. A lease that nobody has touched
for a minute, or whose process on this machine is gone, is taken over. Should two do one piece for all that, both leave
the same file, by renaming.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

EXPIRES = 60.0  # seconds without a touch
POLL = 0.5  # seconds between two looks at what others do


class Piece(NamedTuple):
    """A piece of work.

    Args:
        file: what it leaves.
        is_done: whether that is there, and whole.
        do: does it.
    """

    file: Path
    is_done: Callable[[], bool]
    do: Callable[[], None]


def complete(pieces: Callable[[], Iterable[Piece]], wait: bool = True) -> int:
    """Do every piece that is not done and that nobody else does.

    Args:
        pieces: gives all pieces, in an order; it is called again while others are at work.
        wait: whether to stay until what others do is done, or left by them.

    Returns:
        The number of pieces that were done here.
    """
    done, folders = 0, set()
    while True:
        others = False
        for piece in pieces():
            folders.add(piece.file.parent)
            if piece.is_done():
                continue
            with lease(piece.file) as is_ours:
                if not is_ours:
                    others = True
                elif not piece.is_done():  # meanwhile
                    for left in piece.file.parent.glob(f".{piece.file.stem}.*-*"):  # by one that was killed writing
                        shutil.rmtree(left, ignore_errors=True)
                    piece.do()
                    done += 1
        if not (others and wait):
            break
        time.sleep(POLL)
    for note in (note for folder in folders for note in folder.glob(".*.lease*")):
        if _is_left(note):  # by one that was killed when its work was done
            note.unlink(missing_ok=True)
    return done


@contextmanager
def lease(file: Path) -> Iterator[bool]:
    """Whether the work on ``file`` is this process's for now; if so, others keep away until the end."""
    note = file.with_name(f".{file.name}.lease")
    if not _take(note):
        yield False
        return
    over = threading.Event()
    touching = threading.Thread(target=_touch, args=(note, over), daemon=True)
    touching.start()
    try:
        yield True
    finally:
        over.set()
        touching.join()
        with suppress(FileNotFoundError):
            if note.read_text() == _holder():  # and nobody's who took it over
                note.unlink()


def _take(note: Path) -> bool:
    note.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            with note.open("x") as new:
                new.write(_holder())
            return True
        except FileExistsError:
            if not _is_left(note):
                return False
            # Of those who find it left, one can rename it.
            aside = note.with_name(f"{note.name}-{uuid4().hex}")
            with suppress(FileNotFoundError):
                note.rename(aside)
                aside.unlink()
    return False


def _is_left(note: Path) -> bool:
    """Whether whoever took the lease is gone."""
    try:
        held, touched = note.read_text(), note.stat().st_mtime
    except FileNotFoundError:  # given back
        return False
    machine, _, process = held.partition("\n")
    if machine == _machine() and process.isdecimal() and not _runs(int(process)):
        return True
    return _clock(note.parent) - touched > EXPIRES


def _holder() -> str:
    return f"{_machine()}\n{os.getpid()}"


def _machine() -> str:
    """Where a process's number means something: on this machine, in this container."""
    container = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()} {container}"


def _runs(process: int) -> bool:
    if os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _clock(folder: Path) -> float:
    """Now, by the clock of the file system, as machines' own differ."""
    trial = folder / f".clock-{uuid4().hex}"
    trial.touch()
    try:
        return trial.stat().st_mtime
    finally:
        trial.unlink(missing_ok=True)


def _touch(note: Path, over: threading.Event) -> None:
    while not over.wait(EXPIRES / 6):
        with suppress(FileNotFoundError):
            if note.read_text() == _holder():
                os.utime(note)
