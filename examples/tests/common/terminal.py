"""Runs a program on a terminal of its own, ends it by a signal while it edits a line, and tells how the terminal was left."""
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

master, slave = pty.openpty()
before = termios.tcgetattr(slave)
child = subprocess.Popen(sys.argv[2:], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                         preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))
end, edited = time.monotonic() + 60, False
while time.monotonic() < end and child.poll() is None and not edited:
    if select.select([master], [], [], 0.05)[0]:
        os.read(master, 4096)
    edited = not termios.tcgetattr(slave)[3] & termios.ICANON
child.send_signal(getattr(signal, "SIG" + sys.argv[1]))
code = child.wait(30)
code = 128 - code if code < 0 else code
print(f"code {code}, edited {edited}, restored {termios.tcgetattr(slave) == before}")
