"""`hf-nose inspect ID` by a real client at a Hub on this machine: what a folder says, the Hub says too."""

import json

import pytest
from hub_driver import HubDriver
from hub_stand_in import HubStandIn
from pushable import contents, exported, tiny_nose_vit
from safetensors.torch import save

from hf_nose.cli import BAD_INPUT, FAILED, OK, main
from hf_nose.headers import INDEX, WEIGHTS


pytestmark = pytest.mark.slow
KINDS = ("dense", "diluted", "folded")


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as running:
        yield running


@pytest.fixture(scope="module")
def driver(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    running = HubDriver(folder, hub.environ(folder / "home"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def folders(hub, tmp_path_factory):
    """Checkpoints, each in a folder and in a repository."""
    root = tmp_path_factory.mktemp("exported")
    for kind in KINDS:
        put(hub, f"you/{kind}", contents(exported(root / kind, tiny_nose_vit(kind))))
    return root


def put(hub, name, files, revision="main"):
    """A repository whose branch holds these files."""
    repository = hub.repositories.get(("models", name)) or hub.create(name)
    repository.refs[revision] = repository.add("by hand", repository.at().sha, files).sha
    return repository


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_says_what_the_folder_says(kind, hub, driver, folders, capsys):
    requests = len(hub.requests)
    done = driver.verb("inspect", f"you/{kind}", "--json")
    assert done.code == OK, done.err
    (line,) = done.out.splitlines()
    assert main(["inspect", str(folders / kind), "--json"]) == OK
    there, here = json.loads(line), json.loads(capsys.readouterr().out)
    assert (there.pop("source"), here.pop("source")) == (f"you/{kind}", kind)
    assert here["weights"].pop("bytes") == (folders / kind / WEIGHTS).stat().st_size
    assert there == here and there["mask"] == ([pytest.approx(0.37)] * 2 if kind == "diluted" else [])
    state = {"dense": "dense", "diluted": "in dilution", "folded": "folded"}[kind]
    assert there["state"].startswith(state) and there["layers"]["removed"] == ([0, 2] if kind == "folded" else [])
    assert (there["parameters"] < there["dense_twin"]["parameters"]) == (kind == "folded")
    fetched = {call.split("/")[-1] for call in hub.requests[requests:] if "/resolve/" in call}
    assert fetched == {"config.json", WEIGHTS, INDEX} or fetched == {"config.json", WEIGHTS}, "no code, no card"


def test_for_people(driver, folders):
    done = driver.verb("inspect", "you/folded")
    assert done.code == OK and done.out.startswith("you/folded: NoseViTForImageClassification, 4 blocks of 12")
    assert "Removed     0, 2\n" in done.out and "Folded      0, 2\n" in done.out and "Kept        1, 3\n" in done.out


def test_an_export_of_a_hub_id_takes_the_card_along_and_no_code(hub, driver, folders, tmp_path):
    requests = len(hub.requests)
    done = driver.verb("export", "you/folded", "--output_dir", tmp_path / "out", "--json")
    assert done.code == OK, done.err
    fetched = {call.split("/")[-1] for call in hub.requests[requests:] if "/resolve/" in call}
    assert not {name for name in fetched if name.endswith(".py")} and "README.md" in fetched
    here, there = contents(tmp_path / "out"), contents(folders / "folded")
    assert here.pop("README.md").endswith(there.pop("README.md").split(b"---\n")[2]) and here == there


def test_a_revision(hub, driver, folders):
    put(hub, "you/both", contents(folders / "dense"))
    put(hub, "you/both", contents(folders / "folded"), "variant")
    for words, removed in ((["--revision", "variant"], [0, 2]), ([], [])):
        done = driver.verb("inspect", "you/both", "--json", *words)
        assert json.loads(done.out)["layers"]["removed"] == removed
    done = driver.verb("inspect", "you/both", "--revision", "nowhere")
    assert done.code == FAILED and "404" in done.error


def test_what_is_not_there_or_not_to_be_seen(hub, driver, folders):
    hub.create("somebody/secret", private=True)
    hub.create("somebody/gated", gated=True)
    for name, word in (("somebody/nothing", "404"), ("somebody/secret", "404"), ("somebody/gated", "403")):
        done = driver.verb("inspect", name)
        assert done.code == FAILED and word in done.error and done.out == "", done.error
    put(hub, "you/secret", contents(folders / "folded")).private = True
    assert driver.verb("inspect", "you/secret", HF_TOKEN=None).code == FAILED
    assert driver.verb("inspect", "you/secret").code == OK
    # The configuration is in the cache by now, the weights are not.
    assert "this token cannot see them" in driver.verb("inspect", "you/secret", HF_TOKEN=None).error


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("call", ["resolve/.*/config.json", "resolve/.*/model.safetensors"])
def test_a_hub_that_fails(call, status, hub, driver, folders):
    # Not in the client's cache by an earlier test.
    name = f"you/failing-{call[-5:]}-{status}"
    put(hub, name, contents(folders / "diluted"))
    fault = hub.fail(f"{name}/{call}", status)
    done = driver.verb("inspect", name)
    assert done.code == FAILED and "Traceback" not in done.err and done.out == ""
    fault.times = 0
    assert driver.verb("inspect", name).code == OK


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 2000}, "num_hidden_layers must be in [1, 1000]"),
        ({"hidden_size": 1 << 20}, "config.json is refused"),
        ({"removed_attention_layers": [-1]}, "config.json is refused"),
        ({"removed_attention_layers": list(range(9))}, "config.json is refused"),
        ({"hidden_size": "../../etc"}, "config.json is refused"),
        ({"num_hidden_layers": 5}, "do not fit config.json"),
    ],
)
def test_a_hostile_configuration_is_refused_before_a_module_is_built(change, message, hub, driver, folders):
    files = contents(folders / "folded")
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | change).encode()
    put(hub, "somebody/hostile", files)
    done = driver.verb("inspect", "somebody/hostile")
    assert done.code == BAD_INPUT and message in done.error


def test_pickles_and_files_elsewhere_are_not_fetched(hub, driver, folders):
    files = contents(folders / "diluted")
    weights = files.pop(WEIGHTS)
    put(hub, "somebody/pickle", files | {"pytorch_model.bin": b"pickle"})
    done = driver.verb("inspect", "somebody/pickle")
    assert done.code == BAD_INPUT and "no weights that can be read" in done.error
    assert not hub.calls("pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"vit.dilution_mask": "elsewhere/model.safetensors"}}
    more = {INDEX: json.dumps(index).encode(), "elsewhere/model.safetensors": weights}
    put(hub, "somebody/index", files | more)
    done = driver.verb("inspect", "somebody/index")
    assert done.code == BAD_INPUT and "must name safetensors files beside it" in done.error


def test_shards(hub, driver, folders):
    model, files = tiny_nose_vit("diluted"), contents(folders / "diluted")
    del files[WEIGHTS]
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    files |= {shard: save({name: state[name] for name in held}) for shard, held in shards.items()}
    put(hub, "you/shards", files | {INDEX: json.dumps(index).encode()})
    done = driver.verb("inspect", "you/shards", "--json")
    assert done.code == OK, done.err
    record = json.loads(done.out)
    assert record["weights"]["files"] == sorted(shards) and record["mask"] == [pytest.approx(0.37)] * 2
    index["weight_map"][names[0]] = "model-00002-of-00002.safetensors"
    put(hub, "you/shards-that-lie", files | {INDEX: json.dumps(index).encode()})
    assert "disagree on 1 tensors" in driver.verb("inspect", "you/shards-that-lie").error
