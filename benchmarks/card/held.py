"""A second process that holds memory of the card, so that less is free than there is.

python benchmarks/card/held.py LEAVE_GIB
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

GIB = 2**30
PIECE_GIB = 8


@contextlib.contextmanager
def leaving(gib: float) -> Iterator[None]:
    """All of the card's memory but so much is taken while the block runs."""
    command = [sys.executable, __file__, str(gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin and holder.stdout
        holder.stdout.readline()  # once it holds it
        try:
            yield
        finally:
            holder.stdin.close()


def main() -> None:
    """Allocates what is too much, says so, and waits for the end of its input."""
    import torch

    leave, held = float(sys.argv[1]), []
    if torch.cuda.is_available():
        while (room := torch.cuda.mem_get_info()[0] / GIB - leave) > 0.01:
            held.append(torch.empty(int(min(room, PIECE_GIB) * GIB), dtype=torch.uint8, device="cuda"))
    print(f"{sum(block.numel() for block in held) / GIB:.1f} GiB held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
