"""What the import statements say: dependencies point downwards only, and what travels to the Hub travels light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_nose


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_nose"
# From the ground up: a module may import those before it and no other. A new module gets its place here.
LAYERS = [
    "verbs",
    "guards_nose_vit",
    "configuration_nose_vit",
    "attention_nose_vit",
    "block_nose_vit",
    "states_nose_vit",
    "stream_nose_vit",
    "conversion_nose_vit",
    "modeling_nose_vit",
    "backbone_nose_vit",
    "shapes",
    "published",
    "files",
    "markdown",
    "manifests",
    "records",
    "launch",
    "processes",
    "schedules",
    "optimization",
    "entropy",
    "distillation",
    "criteria",
    "contributions",
    "prefixes",
    "scoring",
    "precision",
    "racing",
    "selection",
    "surgery",
    "splits",
    "sources",
    "specs",
    "sampling",
    "crops",
    "images",
    "image_size",
    "streams",
    "segmentation",
    "data",
    "calibration",
    "weights",
    "image_operations",
    "augmentation",
    "mixing",
    "metrics",
    "profiling",
    "devices",
    "timing",
    "contenders",
    "roofline",
    "memory_probe",
    "memory",
    "headers",
    "inspection",
    "figures",
    "benchmark",
    "benchmark_tables",
    "benchmark_figures",
    "benchmark_command",
    "report",
    "remote_code",
    "privacy",
    "card_text",
    "options",
    "settings",
    "command_line",
    "transfer_settings",
    "arguments",
    "checkpoints",
    "dilution",
    "progress",
    "loading",
    "lora",
    "ema",
    "training",
    "context",
    "evaluation",
    "plan",
    "card_words",
    "cards",
    "card_records",
    "convert",
    "export_source",
    "export",
    "export_space",
    "export_onnx",
    "stock_vit",
    "hub",
    "push",
    "stages",
    "run",
    "transfer",
    "quantization",
    "export_onnx_folder",
    "export_command",
    "checkpoint_verbs",
    "completion",
    "cli",
]
# Never run, but read by transformers, which copies the files that a file names.
NEVER_RUN = {("modeling_nose_vit", "backbone_nose_vit")}
MAX_LINES = 330
TRAVELLING = [name for name in LAYERS if name.endswith("_nose_vit")]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports(node: ast.AST) -> list[str]:
    """Dotted names of everything imported below `node`, neighbours as `hf_nose.NAME`."""
    found = []
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            found += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level < 2, "there is nothing above the package"
            base = ".".join(part for part in ("hf_nose" if statement.level else "", statement.module or "") if part)
            # `from . import files` and `from hf_nose import files` name modules, too.
            found += [f"{base}.{alias.name}" for alias in statement.names] if base == "hf_nose" else [base]
    return found


def neighbours(module: str) -> set[str]:
    """The modules of the package that `module` imports; importing the package itself counts as `__init__`."""
    found = set()
    for name in imports(tree(module)):
        parts = name.split(".")
        if parts[0] == "hf_nose":
            found.add(parts[1] if len(parts) > 1 and parts[1] in MODULES else "__init__")
    return found


def test_every_module_has_a_place():
    assert set(MODULES) <= set(LAYERS), f"give {sorted(set(MODULES) - set(LAYERS))} a place in LAYERS"
    assert len(set(LAYERS)) == len(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_point_downwards_only(module):
    below = set(LAYERS[: LAYERS.index(module)])
    # The public names of __init__ come from the model files; what stands above them may use those names.
    allowed = below | {"__init__"} if LAYERS.index(module) > LAYERS.index("modeling_nose_vit") else below
    above = {name for name in neighbours(module) - allowed if (module, name) not in NEVER_RUN}
    assert not above, f"{module} imports {sorted(above)} from above itself"


@pytest.mark.parametrize("module, name", NEVER_RUN)
def test_what_is_never_run_is_for_type_checkers_alone(module, name):
    parts = [part for part in tree(module).body if f"hf_nose.{name}" in imports(part)]
    assert [ast.unparse(part.test) for part in parts if isinstance(part, ast.If)] == ["TYPE_CHECKING"] * len(parts)


def test_the_package_itself_imports_only_the_model():
    """Whatever needs the Trainer, datasets or evaluate is imported when it is first asked for."""
    body = tree("__init__").body
    late = [statement for statement in body if isinstance(statement, ast.If | ast.FunctionDef)]
    own = {name.split(".")[1] for part in body if part not in late for name in imports(part) if "hf_nose." in name}
    assert own <= set(TRAVELLING)


def test_lazy_names_are_those_that_type_checkers_see():
    (checked,) = [part for part in tree("__init__").body if isinstance(part, ast.If)]
    assert ast.unparse(checked.test) == "TYPE_CHECKING"
    seen = {alias.name: part.module for part in checked.body for alias in part.names}
    assert seen == hf_nose.LAZY
    assert sorted(hf_nose.__all__) == hf_nose.__all__ and set(hf_nose.LAZY) < set(hf_nose.__all__)
    assert all(hasattr(hf_nose, name) for name in hf_nose.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hf_nose.nothing  # noqa: B018


@pytest.mark.parametrize("module", TRAVELLING)
def test_travelling_files_import_nothing_that_stays_at_home(module):
    for name in imports(tree(module)):
        top, *rest = name.split(".")
        if top == "hf_nose":
            assert rest[0] in TRAVELLING
        else:
            assert top in {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names), name


@pytest.mark.parametrize("module", TRAVELLING)
def test_travelling_files_can_be_copied_flat(module):
    """Remote code follows single-dot imports only, and string annotations break `AutoModel.register`."""
    for statement in ast.walk(tree(module)):
        if isinstance(statement, ast.ImportFrom):
            assert statement.module != "__future__"
            if statement.level:
                assert statement.level == 1 and statement.module and "." not in statement.module
            else:
                assert not statement.module.startswith("hf_nose")


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("scripts/**/*.py")]), ids=lambda p: p.stem)
def test_torchvision_and_timm_are_never_imported(path):
    names = imports(ast.parse(path.read_text(encoding="utf-8")))
    assert not [name for name in names if name.split(".")[0] in ("torchvision", "timm")]


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_short(module):
    lines = len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_a_missing_name(module):
    assert module not in ("utils", "helpers", "common") and not module.endswith(("_v2", "_utils"))


@pytest.mark.slow
def test_importing_the_package_is_light():
    code = "import sys, hf_nose; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "kornia",
        "datasets",
        "evaluate",
        "matplotlib",
        "sklearn",
        "peft",
        "torchvision",
        "timm",
        "transformers.trainer",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_the_map_of_the_house_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [module for module in MODULES if not re.search(rf"[`/]{module}\.py`", text)] == []
