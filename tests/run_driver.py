"""
Runs hf_nose again and again in children forked out of one process that has imported everything: a start takes a
fraction of a second instead of ten. One JSON order a line on standard input; a line with the child's number is
answered at once, a line with its exit code when it has ended.

An order may ask the child to halt at a place where a kill would hurt, so that the kill surely falls there.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fork_server import serve


class Driver:
    """The test's end: starts children, knows how far they are, and how they ended."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.child = folder, 0, None
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, bufsize=0
        )
        assert self.read() == {"ready": True}

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, "the driver has ended"
        return json.loads(line)

    def start(self, arguments: list[str], halt: str | None = None, nth: int = 1) -> None:
        """Starts `hf-nose ARGUMENTS`, to halt when it comes to the place `halt` for the `nth` time."""
        if self.child is not None:
            # A test before has failed.
            self.kill(signal.SIGKILL)
        self.count += 1
        files = {name: str(self.folder / f"{self.count}.{name}") for name in ("log", "steps", "halted")}
        self.files = {name: Path(path) for name, path in files.items()}
        order = {"arguments": arguments, "halt": halt, "nth": nth, **files}
        self.process.stdin.write(f"{json.dumps(order)}\n".encode())
        self.child = self.read()["child"]

    @property
    def log(self) -> str:
        """What the last child has written to the screen."""
        return self.files["log"].read_text() if self.files["log"].exists() else ""

    @property
    def steps(self) -> int:
        """Batches that the last child has trained on."""
        return self.files["steps"].stat().st_size if self.files["steps"].exists() else 0

    @property
    def is_halted(self) -> bool:
        return self.files["halted"].exists()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Until `condition` holds; fails where the child ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert not select.select([self.process.stdout], [], [], 0.002)[0], f"the run ended too early:\n{self.log}"
            assert time.monotonic() < deadline, f"nothing came:\n{self.log}"

    def kill(self, number: int) -> int:
        """Sends signal `number`; returns the exit code, negative for a signal that was not caught."""
        if not select.select([self.process.stdout], [], [], 0)[0]:
            os.kill(self.child, number)
        return self.wait()

    def wait(self) -> int:
        """The exit code of the child."""
        code, self.child = self.read()["code"], None
        return code

    def run(self, arguments: list[str]) -> int:
        self.start(arguments)
        return self.wait()

    def close(self) -> None:
        if self.child is not None:
            self.kill(signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Halt:
    """Stops this process for a minute at a place, having said so by a file."""

    def __init__(self, place: str | None, nth: int, file: str):
        self.place, self.left, self.file = place, nth, file

    def __call__(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                Path(self.file).touch()
                time.sleep(60)


def instrument(halt: Halt, steps: str) -> None:
    """Counts batches, and puts halts where a kill would hurt."""
    from hf_nose import checkpoints, context, training
    from hf_nose.modeling_nose_vit import NoseViTForImageClassification

    file = os.open(steps, os.O_WRONLY | os.O_CREAT)

    def around(owner: Any, name: str, before: str | Callable = "", after: str | Callable = "") -> None:
        wrapped = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            halt(before(*args) if callable(before) else before)
            answer = wrapped(*args, **kwargs)
            halt(after(*args) if callable(after) else after)
            return answer

        setattr(owner, name, wrapper)

    trainer = training.NoseTrainer
    # A checkpoint: weights are there, then the optimizer, then the hashes; then it is moved, then an old one goes.
    around(trainer, "_save_optimizer_and_scheduler", before="weights", after="optimizer")
    around(checkpoints, "write_manifest", before="manifest", after="moving")
    around(training, "rotate_checkpoints", before="rotating")
    # A stage: its model is half written, its result is there but not its record.
    around(NoseViTForImageClassification, "save_pretrained", after=lambda model, folder: f"model {Path(folder).name}")
    around(context.RunContext, "write", before=lambda run, stage, record: f"record of {stage}")

    training_step = trainer.training_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        os.write(file, b".")
        return loss

    trainer.training_step = counted


def child(order: dict[str, Any]) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    instrument(Halt(order["halt"], order["nth"], order["halted"]), order["steps"])
    from hf_nose import cli

    code = cli.main(order["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    # Everything that a run imports late, so that its children find it there.
    import evaluate  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import transformers

    import hf_nose.run  # noqa: F401

    torch.set_num_threads(1)
    assert transformers.Trainer
    serve(child, unfinished=70, says_child=True)


if __name__ == "__main__":
    main()
