"""The README's section on the Hub, run word for word, as a person would type it, against the stand-in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_stand_in import HubStandIn
from PIL import Image
from safetensors.torch import load
from sklearn.datasets import load_digits
from tiny_run import finished_run


ROOT = Path(__file__).resolve().parents[1]
HEADING = "The Hub"


def section() -> str:
    """From the heading to the next one of its rank; an error, never nothing, where it is gone."""
    parts = re.split(r"^## +(.*)\n", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert HEADING in found, f"README.md has no section {HEADING!r}; its sections are {list(found)}"
    return found[HEADING]


def blocks() -> list[tuple[str, str]]:
    """Language and code of every block of the section, in order; no other language is let through unrun."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section(), flags=re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} <= {"bash", "python"}
    return found


def test_the_section_pushes_and_loads_both_ways():
    shell = "".join(code for language, code in blocks() if language == "bash")
    python = [code for language, code in blocks() if language == "python"]
    assert "hf-nose push " in shell and "--dry_run" in shell
    assert any("trust_remote_code=True" in code and "hf_nose" not in code for code in python)
    assert any("import hf_nose" in code and "trust_remote_code" not in code for code in python)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_section_runs(tmp_path, tmp_path_factory):
    shutil.copytree(finished_run(tmp_path_factory), tmp_path / "runs" / "digits")
    Image.fromarray((load_digits().images[0] * 15).astype("uint8")).save(tmp_path / "picture.png")
    # `hf-nose` on the path is this checkout's.
    programs, stranger = tmp_path / "bin", tmp_path / "stranger"
    for folder in (programs, stranger):
        folder.mkdir()
    (programs / "hf-nose").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hf_nose.cli "$@"\n')
    (programs / "hf-nose").chmod(0o755)
    # Read by every Python that starts there: to it, hf_nose is not installed.
    (stranger / "sitecustomize.py").write_text('import sys\n\nsys.modules["hf_nose"] = None\n')
    with HubStandIn() as hub:
        environ = hub.environ(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        environ["PATH"] = os.pathsep.join([str(programs), environ["PATH"]])
        for language, code in blocks():
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
            is_stranger = language == "python" and "trust_remote_code=True" in code
            own = {"PYTHONPATH": str(stranger), "HF_HOME": str(tmp_path / "new home")} if is_stranger else {}
            done = subprocess.run(
                command, env=environ | own, cwd=tmp_path, capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, f"{code}\n{done.stderr}"
        (repository,) = hub.repositories.values()
    ours = load((tmp_path / "runs" / "digits" / "model" / "model.safetensors").read_bytes())
    theirs = load(repository.files()["model.safetensors"])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
