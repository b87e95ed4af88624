"""
Clients of the stand-in for the Hub, forked out of one process that has imported everything: the real huggingface_hub
and transformers, with an environment of their own, without ten seconds of start. One JSON order a line on standard
input; its exit code is answered when it has ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fork_server import serve


ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Done:
    """How a client ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that tells what went wrong."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("hf-nose: ")]
        return line


class HubDriver:
    """The test's end. `environ` is that of the clients; a call may change parts of it, `None` taking one away."""

    def __init__(self, folder: Path, environ: dict[str, str]):
        self.folder, self.count = folder, 0
        paths = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environ = environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            cwd=folder,
            bufsize=0,
            start_new_session=True,
        )
        assert self.read() == {"ready": True}

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, "the driver has ended"
        return json.loads(line)

    def order(self, order: dict[str, Any], **environ: str | None) -> Done:
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        order |= {"out": str(out), "err": str(err), "environ": environ}
        self.process.stdin.write(f"{json.dumps(order)}\n".encode())
        code = self.read()["code"]
        return Done(code, out.read_text(), err.read_text())

    def verb(self, *words: object, **environ: str | None) -> Done:
        """`hf-nose WORDS`."""
        return self.order({"words": [str(word) for word in words]}, **environ)

    def close(self) -> None:
        # With the client that a failed test may have left hanging.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def child(order: dict[str, Any]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name, value in order["environ"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    from hf_nose import cli

    code = 70
    try:
        code = cli.main(order["words"])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    # Everything that a push imports late, so that its children find it there.
    import huggingface_hub.hf_api  # noqa: F401
    import torch
    from huggingface_hub.utils import _http

    import hf_nose.push  # noqa: F401
    from hf_nose import hub

    assert hub.HfApi
    torch.set_num_threads(1)
    # The client's waits between its tries, half a minute in all, would only be waited for.
    _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})
    serve(child, unfinished=71)


if __name__ == "__main__":
    main()
