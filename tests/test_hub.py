"""Pushing by a real client to a Hub on this machine: what arrives, and every way in which it can go wrong."""

import json
import shutil
import signal

import psutil
import pytest
from hub_driver import HubDriver
from hub_stand_in import READER, WRITER, HubStandIn
from huggingface_hub import ModelCard
from pushable import contents, exported, tiny_nose_vit
from tiny_run import finished_run

from hf_nose.card_text import is_own, marked
from hf_nose.cli import BAD_INPUT, FAILED, INTERRUPTED, OK, TERMINATED
from hf_nose.export import export_folder
from hf_nose.files import write_json


pytestmark = pytest.mark.slow
WRONG = "hf_nobody_knows_this_one"
# The calls of a push to a branch, as `METHOD path`; the second half are those that the client repeats by itself.
ONCE = [
    "POST /api/repos/create",
    "POST .*/branch/",
    "GET /api/models/you/vit/revision/",
    "POST /api/validate-yaml",
    "POST .*/commit/",
]
REPEATED = ["POST .*/preupload/", "POST .*/objects/batch", "PUT /lfs/upload", "POST /lfs/verify"]
OF_PULL_REQUESTS = ["GET /api/whoami-v2", "GET .*/discussions"]


@pytest.fixture(scope="module")
def server():
    with HubStandIn() as running:
        yield running


@pytest.fixture(scope="module")
def driver(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    running = HubDriver(folder, server.environ(folder / "home"))
    yield running
    running.close()


@pytest.fixture
def hub(server):
    server.reset()
    return server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported checkpoint; only read."""
    return exported(tmp_path_factory.mktemp("exported") / "vit", tiny_nose_vit("folded"))


@pytest.fixture
def push(driver, folder):
    """`hf-nose push` of the folder, which is checked to be as it was, and of which no token is ever written."""
    before = contents(folder)

    def pushed(*words, repo_id="you/vit", token=WRITER, **environ):
        done = driver.verb("push", folder, "--repo_id", repo_id, *words, HF_TOKEN=token, **environ)
        # Untouched, whatever came of it.
        assert contents(folder) == before
        for secret in (WRITER, READER, WRONG):
            assert secret not in done.out + done.err
        return done

    return pushed


def failure(done, code=FAILED):
    """The line that says why a push failed; it is the only one, but for what the client says of its tries."""
    assert done.code == code and done.out == "" and "Traceback" not in done.err
    return done.error


def is_whole(hub, folder, revision="main"):
    """Whether the Hub has what the folder has, the card but for its metadata."""
    ours, there = contents(folder), hub.repository("you/vit").files(revision)
    card, own = there.pop("README.md").decode(), ours.pop("README.md").decode()
    return there == ours and card.endswith(own.split("---\n")[2]) and "template" not in card


def pushed_files(hub, revision="main"):
    """What there is of a push, if only the repository or the branch."""
    repository = hub.repositories.get(("models", "you/vit"))
    return {} if repository is None or revision not in repository.refs else repository.files(revision)


# What arrives


def test_a_push_is_one_commit_and_the_card_is_ours(hub, push, folder):
    done = push("--json")
    assert done.code == OK, done.err
    assert is_whole(hub, folder)
    repository = hub.repository("you/vit")
    assert repository.titles() == ["initial commit", "Upload vit with hf_nose 0.1.0"] and not repository.private
    assert len(hub.calls("POST .*/commit/")) == 1
    said = json.loads(done.out)
    assert said["repo_id"] == "you/vit" and said["revision"] == "main" and said["pull_request"] is None
    assert said["commit"] == repository.at().sha and said["url"] == f"{hub.url}/you/vit/commit/{said['commit']}"
    assert said["files"] == {name: len(content) for name, content in contents(folder).items()}


def test_the_card_gets_the_metadata_it_lacks_and_keeps_every_word(hub, push):
    assert push().code == OK
    card = hub.repository("you/vit").files()["README.md"].decode()
    assert card.endswith("---\n# A card of my own\n\nIt stays as it is: {{ config }}, {% raw %}.\n")
    data = ModelCard(card).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-classification"
    assert data.base_model == "facebook/deit-tiny-patch16-224" and data.license == "apache-2.0"
    assert data.tags == ["mine", "hf_nose"]


def test_a_card_that_names_no_base_model_gets_the_runs(hub, driver, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "export" / "hf")
    (tmp_path / "run" / "export" / "hf" / "README.md").write_text("# Mine\n")
    write_json(tmp_path / "run" / "prepare.json", {"model": {"base_model_id": "facebook/deit-small-patch16-224"}})
    assert driver.verb("push", tmp_path / "run", "--repo_id", "you/vit").code == OK
    card = ModelCard(hub.repository("you/vit").files()["README.md"].decode())
    assert card.data.base_model == "facebook/deit-small-patch16-224" and card.text.strip() == "# Mine"


@pytest.fixture(scope="module")
def rendered(folder, tmp_path_factory):
    """The same with a card that nobody has changed; only read."""
    return export_folder(folder.with_name("vit-source"), tmp_path_factory.mktemp("rendered") / "vit")


def test_the_code_of_a_card_loads_what_was_pushed(hub, driver, rendered):
    """Also by a token's owner that nobody named, and on a branch; in the folder the place stays open."""
    for words in ([], ["--revision", "half"]):
        assert driver.verb("push", rendered, "--repo_id", "named", *words).code == OK
    for revision, more in (("main", ""), ("half", ', revision="half"')):
        card = hub.repository("you/named").files(revision)["README.md"].decode()
        assert f'from_pretrained("you/named"{more}, trust_remote_code=True)' in card and "YOUR_NAME" not in card
        assert "hf-nose transfer --model you/named " in card and not is_own(card)
        # That of the plain ViT is its own.
        assert card.count(', revision="stock")') == 1
    assert "YOUR_NAME/vit" in (rendered / "README.md").read_text()


def test_words_written_on_the_hub_are_not_replaced_by_a_template(hub, driver, rendered, push):
    assert driver.verb("push", rendered, "--repo_id", "you/vit").code == OK
    repository = hub.repository("you/vit")
    theirs = repository.files()["README.md"] + b"Changed on the page.\n"
    changed = repository.files() | {"README.md": theirs}
    repository.refs["main"] = repository.add("by hand", repository.at().sha, changed).sha
    done = driver.verb("push", rendered, "--repo_id", "you/vit")
    assert done.code == OK and "written there stays" in done.out and "Nothing has changed" in done.out
    assert repository.files()["README.md"] == theirs
    done = push("--json")
    assert not json.loads(done.out)["is_card_kept"], "words of one's own are no template"
    assert repository.files()["README.md"].endswith(b"{% raw %}.\n")


@pytest.mark.parametrize("theirs", ["rendered", "---\nlicense: mit\n---\n"])
def test_a_card_in_which_nobody_has_written_is_replaced(theirs, hub, driver, rendered):
    repository = hub.create("you/vit")
    card = marked("# Of an earlier push\n") if theirs == "rendered" else theirs
    repository.refs["main"] = repository.add("by hand", repository.at().sha, {"README.md": card.encode()}).sha
    assert driver.verb("push", rendered, "--repo_id", "you/vit").code == OK
    assert b"Origin not told" in repository.files()["README.md"]


@pytest.mark.parametrize("status", [500, 503])
def test_a_card_that_cannot_be_read_stops_a_push(status, hub, driver, rendered):
    # Not in the client's cache by an earlier test.
    name = f"you/unread-{status}"
    assert driver.verb("push", rendered, "--repo_id", name).code == OK
    repository = hub.repository(name)
    repository.refs["main"] = repository.add("by hand", repository.at().sha, {"README.md": b"Mine."}).sha
    fault = hub.fail(f" /{name}/resolve/", status)
    done = driver.verb("push", rendered, "--repo_id", name)
    assert f"{name}: reading its card failed: {status}" in failure(done)
    assert repository.files()["README.md"] == b"Mine."
    fault.times = 0
    assert driver.verb("push", rendered, "--repo_id", name).code == OK
    assert repository.files()["README.md"] == b"Mine."


def test_a_second_push_of_the_same_sends_and_commits_nothing(hub, push):
    first = push()
    requests = len(hub.requests)
    second = push()
    assert (first.code, second.code) == (OK, OK)
    assert len(hub.repository("you/vit").titles()) == 2
    assert not [call for call in hub.requests[requests:] if call.startswith("PUT") or "/commit/" in call]
    assert "Nothing has changed" in second.out and "Nothing has changed" not in first.out


def test_a_repository_that_exists_is_used_and_what_others_put_there_stays(hub, push, folder):
    repository = hub.create("you/vit")
    repository.refs["main"] = repository.add("by hand", repository.at().sha, {"LICENSE": b"mine"}).sha
    assert push().code == OK
    assert repository.files().pop("LICENSE") == b"mine"
    assert repository.titles() == ["initial commit", "by hand", "Upload vit with hf_nose 0.1.0"]
    assert set(contents(folder)) | {"LICENSE"} == set(repository.files())


def test_weights_and_code_of_an_earlier_push_do_not_stay_beside_the_new(hub, push, folder):
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "old_nose_vit.py"]
    repository = hub.create("you/vit")
    repository.refs["main"] = repository.add("old", repository.at().sha, dict.fromkeys(stale, b"old")).sha
    assert push().code == OK and is_whole(hub, folder)
    assert len(repository.titles()) == 3


def test_weights_below_the_top_are_somebody_elses(hub, push):
    """An adapter, say, or another variant: nothing loads them in place of these."""
    theirs = {"adapter/adapter_model.safetensors": b"mine", "dense/model.safetensors.index.json": b"mine"}
    repository = hub.create("you/vit")
    repository.refs["main"] = repository.add("by hand", repository.at().sha, theirs).sha
    assert push().code == OK
    assert {name: content for name, content in repository.files().items() if name in theirs} == theirs


def test_a_name_without_owner_goes_to_the_owner_of_the_token(hub, push):
    assert push(repo_id="vit").code == OK
    assert list(hub.repositories) == [("models", "you/vit")]


def test_private(hub, push):
    assert push("--private").code == OK
    assert hub.repository("you/vit").private
    assert push("--private").code == OK


def test_private_does_not_publish_by_a_repository_that_is_public(hub, push):
    hub.create("you/vit")
    assert "you/vit exists and is public" in failure(push("--private"), BAD_INPUT)
    assert hub.repository("you/vit").files() == {} and not hub.calls("PUT")


def test_variants_are_revisions(hub, push, folder):
    assert push().code == OK
    assert push("--revision", "half/way").code == OK
    assert is_whole(hub, folder, "half/way")
    assert set(hub.repository("you/vit").refs) == {"main", "half/way"}
    assert push("--revision", "main").code == OK
    assert len(hub.repository("you/vit").titles()) == 2


def test_a_revision_of_a_new_repository_leaves_main_alone(hub, push, folder):
    assert push("--revision", "stock").code == OK
    assert is_whole(hub, folder, "stock") and hub.repository("you/vit").files("main") == {}


def test_a_pull_request_commits_nothing_and_is_opened_once(hub, push, folder):
    hub.create("somebody/vit")
    done = push("--create_pr", repo_id="somebody/vit")
    assert done.code == OK, done.err
    assert f"{hub.url}/somebody/vit/discussions/1" in done.out
    repository = hub.repository("somebody/vit")
    assert repository.files() == {} and set(repository.files("refs/pr/1")) == set(contents(folder))
    again = push("--create_pr", repo_id="somebody/vit")
    assert again.code == OK and f"{hub.url}/somebody/vit/discussions/1" in again.out
    assert len(repository.pull_requests) == 1 and len(repository.titles("refs/pr/1")) == 2


def test_what_has_changed_since_goes_into_the_pull_request_that_is_open(hub, push, driver, folder, tmp_path):
    hub.create("somebody/vit")
    assert push("--create_pr", repo_id="somebody/vit").code == OK
    copy = shutil.copytree(folder, tmp_path / "vit")
    (copy / "NOTES.md").write_text("More.\n")
    done = driver.verb("push", copy, "--repo_id", "somebody/vit", "--create_pr")
    assert done.code == OK and "discussions/1" in done.out
    repository = hub.repository("somebody/vit")
    assert len(repository.pull_requests) == 1 and repository.files() == {}
    assert repository.files("refs/pr/1")["NOTES.md"] == b"More.\n" and len(repository.titles("refs/pr/1")) == 3


def test_pull_requests_of_others_and_closed_ones_are_let_be(hub, push):
    repository = hub.create("somebody/vit")
    title = "Upload vit with hf_nose 0.1.0"
    for author, status in (("somebody", "open"), ("you", "closed")):
        repository.pull_requests.append({"num": 0, "title": title, "author": author, "status": status})
    assert push("--create_pr", repo_id="somebody/vit").code == OK
    assert len(repository.pull_requests) == 3


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(hub, push, folder):
    done = push("--dry_run", token=None)
    assert done.code == OK and hub.requests == []
    files = {name: len(content) for name, content in contents(folder).items()}
    for name, size in [*files.items(), (f"{len(files)} files", sum(files.values()))]:
        assert f"{size:,} bytes  {name}\n" in done.out
    assert json.loads(push("--dry_run", "--json").out)["files"] == files


def test_a_run_pushes_its_result_when_it_is_finished(hub, driver, tmp_path, tmp_path_factory):
    run = shutil.copytree(finished_run(tmp_path_factory), tmp_path / "digits-nose")
    again = ("run", "--resume", f"--output_dir={run}", "--push_to_hub")
    before = contents(run)
    done = driver.verb(*again, HF_TOKEN=READER)
    assert "The token may only read" in failure(done) and contents(run) == before

    fault = hub.fail("POST .*/commit/", 503)
    done = driver.verb(*again)
    assert done.code == FAILED and "The run is finished, but the push is not. you/digits-nose: sending" in done.error
    assert f"Repeat it by `hf-nose push {run} --repo_id digits-nose`" in done.error

    fault.times = 0
    (run / "export" / "hf" / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    done = driver.verb(*again)
    assert done.code == OK, done.err
    repository = hub.repository("you/digits-nose")
    assert f"{hub.url}/you/digits-nose/commit/{repository.at().sha}" in done.out
    assert repository.files()["README.md"].endswith(b"---\nMy own words.\n")
    assert {"config.json", "model.safetensors", "modeling_nose_vit.py", "selection.json"} <= set(repository.files())
    assert len(repository.titles()) == 2
    kept = (run / "settings.yaml").read_text() + done.out + done.err
    assert "push_to_hub" not in kept and WRITER not in kept


# What goes wrong


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("call", [*ONCE, *REPEATED])
def test_a_call_that_fails_is_named_and_the_next_push_ends_right(call, status, hub, push, folder):
    fault = hub.fail(call, status)
    line = failure(push("--revision", "half"))
    assert line.startswith("hf-nose: you/vit: ") and " failed: " in line and str(status) in line
    assert "push again" in line
    assert pushed_files(hub, "half") == {}
    fault.times = 0
    assert push("--revision", "half").code == OK
    assert is_whole(hub, folder, "half") and len(hub.repository("you/vit").titles("half")) == 2


@pytest.mark.parametrize("call", OF_PULL_REQUESTS)
def test_a_call_of_a_pull_request_that_fails(call, hub, push):
    hub.create("somebody/vit")
    fault = hub.fail(call, 503)
    assert "503" in failure(push("--create_pr", repo_id="somebody/vit"))
    fault.times = 0
    assert push("--create_pr", repo_id="somebody/vit").code == OK
    assert len(hub.repository("somebody/vit").pull_requests) == 1


@pytest.mark.parametrize("call", [*ONCE, *REPEATED])
def test_a_web_page_instead_of_the_hubs_answer(call, hub, push, folder):
    fault = hub.fail(call, 503, html=True)
    assert "push again" in failure(push("--revision", "half"))
    fault.times = 0
    assert push("--revision", "half").code == OK and is_whole(hub, folder, "half")


@pytest.mark.parametrize("call", REPEATED)
def test_what_fails_once_is_tried_again_by_the_client(call, hub, push, folder):
    hub.fail(call, 503, times=1)
    assert push().code == OK
    assert is_whole(hub, folder) and len(hub.repository("you/vit").titles()) == 2


def test_a_connection_cut_in_the_middle_of_an_upload_is_mended(hub, push, folder):
    hub.fail("PUT /lfs/upload", cut=5000, times=1)
    assert push().code == OK and is_whole(hub, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("call", ["POST /api/repos/create", "PUT /lfs/upload", "POST .*/commit/"])
def test_a_push_that_is_stopped_is_repeated(call, number, hub, push, driver, folder):
    """By Ctrl-C, by a scheduler, by the machine: before the request is answered."""

    def stop():
        (child,) = psutil.Process(driver.process.pid).children()
        child.send_signal(number)
        if number == signal.SIGKILL:
            psutil.wait_procs([child], 10)

    hub.fail(call, times=1, meanwhile=stop)
    done = push()
    assert done.code == {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGKILL: -9}[number]
    assert "Traceback" not in done.err and "--resume" not in done.err
    assert number == signal.SIGKILL or "what has arrived is not sent twice: push again" in done.err
    assert push().code == OK
    assert is_whole(hub, folder) and len(hub.repository("you/vit").titles()) == 2


@pytest.mark.parametrize(
    "call, length", [("PUT /lfs/upload", 5000), ("POST .*/commit/", 2000), ("POST /api/repos", 0)]
)
def test_a_connection_cut_again_and_again(call, length, hub, push, folder):
    fault = hub.fail(call, cut=length)
    assert "push again" in failure(push())
    assert pushed_files(hub) == {}
    fault.times = 0
    assert push().code == OK
    assert is_whole(hub, folder) and len(hub.repository("you/vit").titles()) == 2


def test_a_hub_that_answers_nothing(hub, push):
    hub.fail(".", cut=0)
    assert "making the repository failed" in failure(push())


@pytest.mark.parametrize("words", [[], ["--revision", "half"]])
def test_a_commit_that_landed_but_was_answered_503_is_not_made_twice(words, hub, push, folder):
    hub.fail("POST .*/commit/", 503, landed=True, times=1)
    assert "what has arrived is not sent twice" in failure(push(*words))
    branch = words[-1] if words else "main"
    assert is_whole(hub, folder, branch)
    uploads = len(hub.calls("PUT"))
    assert push(*words).code == OK
    assert is_whole(hub, folder, branch) and len(hub.repository("you/vit").titles(branch)) == 2
    assert len(hub.calls("PUT")) == uploads


def test_a_pull_request_that_landed_but_was_answered_503_is_not_opened_twice(hub, push):
    hub.create("somebody/vit")
    hub.fail("POST .*/commit/", 503, landed=True, times=1)
    failure(push("--create_pr", repo_id="somebody/vit"))
    done = push("--create_pr", repo_id="somebody/vit")
    assert done.code == OK and "discussions/1" in done.out
    assert len(hub.repository("somebody/vit").pull_requests) == 1


def test_the_answer_to_a_new_repository_is_lost(hub, push, folder):
    hub.fail("POST /api/repos/create", 503, landed=True, times=1)
    assert "making the repository failed: 503" in failure(push())
    assert push().code == OK and is_whole(hub, folder)


def test_no_token(hub, push):
    assert "There is no token: log in" in failure(push(token=None))
    assert hub.requests == []


def test_a_token_nobody_knows(hub, push):
    line = failure(push(token=WRONG))
    assert "401" in line and "The token is not valid" in line and hub.repositories == {}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_token_without_write_permission(is_there, hub, push):
    if is_there:
        hub.create("you/vit")
    line = failure(push(token=READER))
    assert "403" in line and "may not write to you/vit" in line
    assert not is_there or hub.repository("you/vit").files() == {}


def test_the_namespace_of_somebody_else(hub, push):
    assert "may not write to somebody/vit" in failure(push(repo_id="somebody/vit"))
    hub.create("somebody/vit")
    assert "may not write to somebody/vit" in failure(push(repo_id="somebody/vit"))


def test_a_gated_repository(hub, push):
    hub.create("somebody/vit", gated=True)
    line = failure(push("--create_pr", repo_id="somebody/vit"))
    assert "403" in line and "somebody/vit is gated: ask for access" in line


def test_a_repository_that_does_not_exist_or_is_not_to_be_seen(hub, push):
    hub.create("somebody/secret", private=True)
    for name in ("somebody/vit", "somebody/secret"):
        line = failure(push("--create_pr", repo_id=name))
        assert "404" in line and f"{name} does not exist, or this token cannot see it" in line


@pytest.mark.parametrize("status", [409, 412])
def test_a_commit_of_somebody_else_in_between(status, hub, push, folder):
    hub.fail("POST .*/commit/", status, times=1)
    line = failure(push())
    assert str(status) in line and "changed it meanwhile" in line
    assert push().code == OK and is_whole(hub, folder)


def test_a_commit_is_made_on_what_was_looked_at(hub, push):
    repository = hub.create("you/vit")

    def somebody_commits():
        repository.refs["main"] = repository.add("by hand", repository.at().sha, {"config.json": b"theirs"}).sha

    hub.fail("POST .*/preupload/", times=1, meanwhile=somebody_commits)
    assert "412" in failure(push())
    assert repository.files() == {"config.json": b"theirs"}


def test_a_card_that_the_hub_refuses_is_bad_input(hub, push):
    hub.fail("POST /api/validate-yaml", 400)
    failure(push(), BAD_INPUT)
    assert not hub.calls("PUT") and not hub.calls("POST .*/commit/")


@pytest.mark.parametrize("environ", [{}, {"HF_NOSE_TRACEBACK": "1"}])
@pytest.mark.parametrize("call", ["POST /api/repos/create", "PUT /lfs/upload", "POST .*/commit/"])
def test_a_server_that_repeats_the_token_does_not_get_it_printed(call, environ, hub, push):
    hub.fail(call, 400, message=f"Bad token {WRITER}")
    done = push(**environ)
    assert done.code != OK and "Bad token ***" in done.err
