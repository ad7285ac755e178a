"""Nothing talks to other machines: no test (the guard in conftest.py), and no command."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

# any use of the network at all, of names too, ends the process at once
OFFLINE = """
import os, sys
def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        os.write(2, f"{event} {arguments}".encode())
        os._exit(99)
sys.addaudithook(refuse)
import curvature_cli.main as main
codes = [main.run(line.split()) for line in sys.argv[1:]]
print(codes, file=sys.stderr)
"""


def test_the_guard_refuses_other_machines_and_no_others():
    with socket.socket() as tcp, pytest.raises(AssertionError, match=r"a connection to 192\.0\.2\.1"):
        tcp.connect(("192.0.2.1", 80))
    with socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.raises(AssertionError, match="a connection to 192"):
        udp.sendto(b"", ("192.0.2.1", 53))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"1")
        with server.accept()[0] as accepted:
            assert accepted.recv(1) == b"1"


def test_commands_use_no_network(folder):
    lines = [
        "spectrum demo:digits --params 4.* --probes 2 --steps 3 --out run --format json",
        "trace ./task.py:make --format quiet",
        "inspect demo:digits --format quiet",
        "env --format quiet",
        "eig missing.pt --loss cross-entropy --data train.npz",
        "trace org/model --loss cross-entropy --data train.npz",
    ]
    ran = subprocess.run([sys.executable, "-c", OFFLINE, *lines], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[-1] == "[0, 0, 0, 0, 3, 3]"
    assert json.loads(ran.stdout)["complete"]
