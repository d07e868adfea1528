"""Runs in every machine from its boot on: waits for the tests to send the program that serves them, and becomes it."""

import json
import os
import select
import time

PORT = "/dev/virtio-ports/room"

while not os.path.exists(PORT):
    time.sleep(0.05)
port = os.open(PORT, os.O_RDWR)
os.write(port, b'{"hello": true}\n')
line = b""
while not line.endswith(b"\n"):
    select.select([port], [], [])
    # One byte at a time: what follows the line is for the program. Nothing at all: nobody is at the other end.
    line += os.read(port, 1) or time.sleep(0.05) or b""
program = json.loads(line)["program"]
exec(compile(program, "agent.py", "exec"), {"__name__": "agent", "port": port})
