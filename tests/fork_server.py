"""
The serving end of a driver: orders come in as lines of JSON, each is carried out by a child forked out of this
process, which has imported everything; a line with its exit code answers when it has ended.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(child: Callable[[dict[str, Any]], None], unfinished: int, says_child: bool = False) -> None:
    """
    Until standard input ends. `child` leaves by `os._exit`; where it raises instead, the exit code is `unfinished`.
    With `says_child` the child's number is answered as soon as it runs.
    """
    answers = os.fdopen(os.dup(1), "w")

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer(ready=True)
    # Not `for line in sys.stdin`, which reads ahead: a child would share that.
    while line := sys.stdin.readline():
        number = os.fork()
        if number == 0:
            try:
                child(json.loads(line))
            finally:
                os._exit(unfinished)
        if says_child:
            answer(child=number)
        answer(code=os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
