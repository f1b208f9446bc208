"""The peers that are compared with gpt-faster; as a program, one of them that serves a parent.

    python -m scripts.bench.peers.table SIDE PATH THREADS

Nothing that a peer's environment may lack is imported here.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from measure.memory import peak_main_memory
from scripts.bench.peers import llama, openvino
from scripts.bench.peers.environment import python_of
from scripts.bench.peers.protocol import serve


@dataclass(frozen=True)
class Peer:
    """serves: a class of (path, threads). path_of: of (GGUF file, precision), what it reads, made if it is not there.

    environment: of its own; None: it is installed in ours.
    """

    serves: type
    path_of: Callable[[Path, str], Path]
    environment: str | None = None


PEERS = {
    "llama.cpp": Peer(llama.LlamaCpp, llama.llama_file),
    "openvino": Peer(openvino.OpenVino, openvino.openvino_folder, openvino.NAME),
    "ik_llama.cpp": Peer(llama.IkLlamaCpp, llama.llama_file, "ik_llama.cpp"),
}


def peer_command(side: str, precision: str, model: str, threads: int) -> list[str]:
    """What starts a peer, after what it needs is made; ValueError if that cannot be."""
    peer = PEERS[side]
    python = python_of(peer.environment) if peer.environment else sys.executable
    path = peer.path_of(llama.gguf_of(model), precision)
    return [str(python), "-m", "scripts.bench.peers.table", side, str(path), str(threads)]


if __name__ == "__main__":
    side, path, threads = sys.argv[1:]
    serve(partial(PEERS[side].serves, path, int(threads)), peak_main_memory)
