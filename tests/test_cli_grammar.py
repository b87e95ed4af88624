"""One grammar for all verbs: quick help that says what is written, exit codes, JSON on the last line, completion."""

import argparse
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from exported import checkpoint, made_run
from tiny_run import finished_run, record

from hf_nose import cli
from hf_nose.cli import BAD_INPUT, EXIT_CODES, FAILED, INTERRUPTED, OK, TERMINATED, main, verb_parser
from hf_nose.verbs import VERBS, underscored


ROOT = Path(__file__).resolve().parents[1]
ISSUE = "run profile select dilute fold evaluate report benchmark transfer export push inspect convert env".split()
HEAVY = (
    "transformers.trainer datasets evaluate peft kornia matplotlib sklearn onnx onnxruntime gradio shtab hf_nose.run"
)
# Seconds of processor time over `import hf_nose`, the median of a few.
LIMIT = 0.3
COST = """
import json, os, sys, time
import hf_nose
verbs, rounds, heavy = sys.argv[1].split(), int(sys.argv[2]), sys.argv[3].split()
for verb in verbs * rounds:
    reader, writer = os.pipe()
    if os.fork() == 0:
        before, code = time.process_time(), None
        sys.stdout = open(os.devnull, "w")
        from hf_nose.cli import main
        try:
            main([verb, "--help"])
        except SystemExit as ended:
            code = ended.code
        found = [name for name in heavy if name in sys.modules]
        os.write(writer, json.dumps([verb, code, time.process_time() - before, found]).encode())
        os._exit(0)
    os.close(writer)
    print(os.read(reader, 10_000).decode(), flush=True)
    os.wait()
"""


@pytest.mark.slow
def test_help_is_quick_and_imports_nothing_heavy():
    """Of every verb, in processes that have `import hf_nose` behind them and nothing else."""
    command = [sys.executable, "-c", COST, " ".join(VERBS), "5", HEAVY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5 * len(VERBS)
    assert {(code, tuple(heavy)) for _, code, _, heavy in found} == {(0, ())}, found
    costs = {verb: statistics.median(cost for name, _, cost, _ in found if name == verb) for verb in VERBS}
    assert {verb: cost for verb, cost in costs.items() if cost > LIMIT} == {}


def test_the_verbs_are_those_of_the_issue():
    assert sorted(VERBS) == sorted(ISSUE)


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_in_what_is_written(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == OK and said.startswith(f"usage: hf-nose {verb} ")
    assert " ".join(said.split()).endswith(f" {VERBS[verb].writes}") and VERBS[verb].writes.startswith("Writes ")
    assert " --json " in said


@pytest.mark.parametrize("verb", VERBS)
def test_one_grammar(verb):
    """Whole names with underscores, help for every option, no short ones, and the same words for the same things."""
    parser = verb_parser(verb)
    assert not parser.allow_abbrev
    for action in parser._actions:
        assert action.help, action.dest
        if action.option_strings and action.dest != "help":
            assert re.fullmatch(r"--(no_)?[a-z0-9_]+", action.option_strings[0]), action.option_strings
    same = {"json": bool, "overwrite": bool, "device": "auto cpu cuda mps", "output_dir": None, "seed": 0}
    for action in parser._actions:
        if action.dest in same and isinstance(same[action.dest], str):
            assert " ".join(action.choices) == same[action.dest] and action.default == "auto"
        if action.dest == "json":
            assert isinstance(action, argparse._StoreTrueAction)


@pytest.mark.parametrize("verb", VERBS)
def test_abbreviations_are_refused(verb, tmp_path, capsys):
    """`--js` is not `--json`; nothing is run."""
    positional = [str(tmp_path)] if any(not action.option_strings for action in verb_parser(verb)._actions) else []
    needed = {
        "evaluate": ["--model=x", "--dataset=y"],
        "benchmark": ["--model=x"],
        "transfer": ["--model=x", "--dataset=digits", "--steps=1"],
    }
    if verb in cli.STAGE_VERBS:
        (tmp_path / "settings.yaml").write_text("seed: 0\n")
    try:
        code = main([verb, *positional, *needed.get(verb, []), "--js"])
    except SystemExit as ended:
        code = ended.code
    assert code == BAD_INPUT and "--js" in capsys.readouterr().err


def test_dashes_inside_of_options_are_underscores(tmp_path, capsys):
    assert underscored("--output-dir=a-b") == "--output_dir=a-b" and underscored("a-b") == "a-b"
    assert underscored("--int8") == "--int8" and underscored("-1") == "-1"
    source = checkpoint(tmp_path / "source")
    assert main(["export", str(source), "--output-dir", str(tmp_path / "my-out"), "--base-model-id=a/b-c"]) == OK
    assert "base_model: a/b-c" in (tmp_path / "my-out" / "README.md").read_text()
    capsys.readouterr()


# Exit codes


def test_exit_codes_are_written_in_the_help(capsys):
    assert list(EXIT_CODES) == [OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED] == [0, 1, 2, 130, 143]
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == OK and "exit codes:\n" in said
    assert all(f"\n  {code:<10}{text}\n" in said for code, text in EXIT_CODES.items())


@pytest.mark.parametrize(
    "words", [["--version"], ["push"], ["push", "x", "--forma", "hf"], ["export", "x", "--format=x"]]
)
def test_argparse_ends_with_the_code_of_bad_input(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == BAD_INPUT and capsys.readouterr().out == ""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
@pytest.mark.parametrize("verb", VERBS)
def test_a_stopped_verb_says_what_is_left_of_it(verb, number, code, monkeypatch, capsys):
    monkeypatch.setattr(cli, "dispatch", lambda *_: signal.raise_signal(number))
    assert main([verb]) == code
    said = capsys.readouterr()
    how = "Interrupted" if code == INTERRUPTED else "Terminated"
    assert said.err == f"\n{how}. {VERBS[verb].stopped}\n" and said.out == ""
    is_resumed = "--resume" in VERBS[verb].stopped
    assert is_resumed == (verb in ("run", "transfer", "dilute"))
    if is_resumed and verb != "dilute":
        assert any("--resume" in action.option_strings for action in verb_parser(verb)._actions)


class Stopper:
    """An error stream to which the first word is the last: a real signal, in the middle of a real verb."""

    def __init__(self, stream, number):
        self.stream, self.number, self.is_done = stream, number, False

    def write(self, text):
        self.stream.write(text)
        if not self.is_done:
            self.is_done = True
            signal.raise_signal(self.number)

    def flush(self):
        self.stream.flush()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_a_stopped_benchmark_says_no_word_of_resume(number, code, tmp_path, monkeypatch, capsys):
    words = ["benchmark", "--model", str(checkpoint(tmp_path / "model")), "--device=cpu", "--batch_sizes=1"]
    words += ["--rounds=6", "--warmup=0", "--threads=1", "--output_dir", str(tmp_path / "out")]
    capsys.readouterr()
    monkeypatch.setattr(sys, "stderr", Stopper(sys.stderr, number))
    assert main(words) == code
    said = capsys.readouterr().err
    assert "batch 1" in said and said.endswith(f"{VERBS['benchmark'].stopped}\n") and "--resume" not in said
    assert main(words) == OK, "the same line goes on"
    assert [path.suffix for path in sorted((tmp_path / "out").glob("*.json"))] == [".json"]


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_codes_of_a_process_that_is_stopped(number, code):
    """As a shell sees them, not minus the number of the signal."""
    script = (
        "import signal, sys\nfrom hf_nose import cli\n"
        "cli.dispatch = lambda *_: signal.raise_signal(int(sys.argv[1]))\nsys.exit(cli.main(['run']))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(int(number))], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == code


# JSON


def last_line(capsys):
    """What a program reads: one line, and nothing else on stdout."""
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_json_of_verbs_on_checkpoints(tmp_path, capsys):
    run = made_run(tmp_path / "run")
    for words, keys in (
        (["inspect", str(run / "model")], {"layers", "mask", "parameters", "macs", "dense_twin", "state"}),
        (["export", str(run)], {"output_dir", "format", "files"}),
        (["push", str(run), "--dry_run"], {"dry_run", "repo_id", "files"}),
        (["env"], {"versions", "hardware"}),
    ):
        assert main([*words, "--json"]) == OK
        assert keys <= set(last_line(capsys)), words


@pytest.mark.slow
def test_json_of_a_benchmark(tmp_path, capsys):
    words = ["benchmark", "--model", str(checkpoint(tmp_path / "model")), "--device=cpu", "--batch_sizes=1"]
    capsys.readouterr()
    assert main([*words, "--rounds=6", "--warmup=0", "--threads=1", "--json"]) == OK
    assert {"hardware", "groups", "versions"} <= set(last_line(capsys))


@pytest.mark.slow
def test_json_of_jobs_is_their_record(tmp_path_factory, tmp_path, capsys):
    run = shutil.copytree(finished_run(tmp_path_factory), tmp_path / "run")
    capsys.readouterr()
    for verb, name in (("report", "report"), ("fold", "fold")):
        assert main([verb, str(run), "--json"]) == OK
        said = capsys.readouterr()
        (line,) = said.out.splitlines()
        assert json.loads(line) == {"output_dir": str(run), "record": record(run, name)}
        assert f"[1/1] {verb}" in said.err
    assert main(["run", "--resume", f"--output_dir={run}", "--json"]) == OK
    assert last_line(capsys) == {"output_dir": str(run), "record": record(run, "metrics")}
    words = ["--model", str(run / "model"), "--dataset=digits", "--device=cpu", "--max_eval_samples=20"]
    assert main(["evaluate", *words, "--json"]) == OK
    assert last_line(capsys)["num_images"] == 20


# Completion


def completed(script, *words):
    """What bash offers for the last of `words`, by the function that the script registers."""
    lines = [
        f"source {script}",
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}",
        "_shtab_hf_nose",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "hf-nose"
    with pytest.MonkeyPatch.context() as patch, open(path, "w") as file:
        patch.setattr(sys, "stdout", file)
        assert main(["--print-completion", "bash"]) == OK
    assert "complete " in path.read_text()
    return path


def test_bash_completes_verbs(bash_script):
    assert completed(bash_script, "hf-nose", "ex") == {"export"}
    assert completed(bash_script, "hf-nose", "pr") == {"profile"}
    assert completed(bash_script, "hf-nose", "''") == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_bash_completes_every_option_of_a_verb(verb, bash_script):
    options = {word for action in verb_parser(verb)._actions for word in action.option_strings if word[:2] == "--"}
    assert completed(bash_script, "hf-nose", verb, "--") == options and "--help" in options


def test_bash_completes_choices_and_files(bash_script, tmp_path):
    assert completed(bash_script, "hf-nose", "export", "--format", "st") == {"stock-vit"}
    assert completed(bash_script, "hf-nose", "run", "--num_rem") == {"--num_removed"}
    (tmp_path / "base_01346.pth").touch()
    assert completed(bash_script, "hf-nose", "convert", str(tmp_path / "base")) == {str(tmp_path / "base_01346.pth")}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(shell, tmp_path, capsys):
    assert main(["--print_completion", shell]) == OK
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS) and "num_removed" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        assert subprocess.run([shell, "-n", tmp_path / "script"], timeout=60).returncode == 0


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == FAILED
    assert "pip install 'hf_nose[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--print-completion"], ["--print-completion", "fish"]])
def test_a_shell_that_is_not_known(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == BAD_INPUT and "print_completion" in capsys.readouterr().err
