"""An `srde` that starts at once: a server that has imported everything forks a process for each command.

The client is a script to be put on the PATH. It hands the server its arguments, folder, environment, output and errors, and ends
with the command's exit status; so a shell cannot tell it from the real one, except by the seconds that imports take.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
socket.send_fds(server, [len(data := json.dumps(job).encode()).to_bytes(8, "big")], [1, 2])
server.sendall(data)
sys.exit(int(server.makefile().readline() or 1))
"""


class Preloaded:
    """The server, and the script that uses it.

    Args:
        script: Where the script goes.
    """

    def __init__(self, script: Path):
        address = str(script.with_suffix(".socket"))
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, address],
            env=env,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.server.stdout.readline() == b"ready\n"
        script.write_text(CLIENT.format(python=sys.executable, address=address))
        script.chmod(0o755)

    def close(self):
        """Ends the server and whatever it has started."""
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
        self.server.stdout.close()


def serve(address):
    """Answers commands until it is killed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import torch

    torch.set_num_threads(1)
    import srde.data.build.build
    import srde.eval.report
    import srde.monitor.plots
    import srde.plan.plan
    import srde.train.run  # noqa: F401
    from srde.cli import main

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        size, descriptors, _, _ = socket.recv_fds(client, 8, 2)
        job = json.loads(client.makefile("rb").read(int.from_bytes(size, "big")))
        pid = os.fork()
        if pid == 0:
            listener.close()
            os.dup2(descriptors[0], 1)
            os.dup2(descriptors[1], 2)
            os.environ.clear()
            os.environ.update(job["env"])
            os.chdir(job["cwd"])
            code = 1
            try:
                code = main(job["argv"])
            except SystemExit as error:
                code = error.code or 0
            except BaseException:  # noqa: BLE001 - what the interpreter would do
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        client.close()


if __name__ == "__main__":
    serve(sys.argv[1])
