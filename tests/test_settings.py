"""Defaults, recipes and flags; what each stage depends on."""

from dataclasses import asdict, fields, replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_nose.command_line import EXCLUSIVE, parse_settings, read_recipe, recipe_path
from hf_nose.options import NO_RESULT, OF_ONE_CALL
from hf_nose.settings import DEPENDS, OF_TRAINING, STAGES, Settings


def recipe(tmp_path, **values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


# Which value counts


def test_without_arguments_it_is_the_digits_recipe():
    settings = parse_settings([])
    values = yaml.safe_load(recipe_path("digits").read_text())
    assert len(values) > 5
    assert {name: getattr(settings, name) for name in values} == values
    assert settings.folder.as_posix() == "runs/digits"
    assert settings.stage_list == list(STAGES)


def test_the_digits_recipe_trains_no_other_model_or_data():
    """Its dense steps would spoil a pretrained model: any other is compressed by the short recipe."""
    short = yaml.safe_load(recipe_path("short").read_text())
    for flags in (["--model", "someone/vit-tiny"], ["--dataset=someone/photos"]):
        settings = parse_settings([*flags, "--batch_size", "7"])
        assert settings.dense_steps == 0 and settings.recipe is None
        assert {name: getattr(settings, name) for name in short} == {**short, "batch_size": 7}
    assert parse_settings(["--model", "someone/vit-tiny"]).folder.as_posix() == "runs/vit-tiny"
    searched = parse_settings(["--model", "someone/vit-tiny", "--num_removed", "2", "--steps", "9"])
    assert (searched.ratio, searched.epochs, searched.steps) == (None, None, 9)


def test_without_any_recipe_there_are_defaults_and_flags():
    for flags in ([], ["--model", "someone/vit-tiny"], ["--dataset=someone/photos"]):
        settings = parse_settings([*flags, "--recipe", "none", "--seed=3"])
        given = Settings(recipe="none", seed=3)
        assert replace(settings, model=given.model, dataset=given.dataset) == given
    assert parse_settings(["--model", "someone/vit-tiny", "--recipe=none"]).folder.as_posix() == "runs/vit-tiny"


def test_a_named_recipe_takes_the_place_of_the_short_one():
    assert parse_settings(["--model", "someone/vit-tiny", "--recipe", "digits"]).dense_steps > 0
    assert parse_settings(["--model", Settings.model, "--dataset", "digits"]) == parse_settings([])


def test_the_folder_of_a_model_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "vit" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "vit" / "inside")
    for model in ("..", "../", str(tmp_path / "vit")):
        assert parse_settings(["--model", model]).folder.as_posix() == "runs/vit"


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, seed=3, batch_size=7, flip=True, mask="double", learning_rate=0.5)
    settings = parse_settings(["--recipe", path, "--batch_size", "9", "--flip", "false", "--mask=skip"])
    assert (settings.seed, settings.batch_size, settings.flip, settings.mask) == (3, 9, False, "skip")
    assert settings.learning_rate == 0.5
    assert settings.eval_batch_size == Settings.eval_batch_size
    assert settings.folder.as_posix() == "runs/recipe"


def test_flags_may_be_typed_with_hyphens(tmp_path):
    path = recipe(tmp_path, ratio=0.4, epochs=3.0)
    settings = parse_settings(["--recipe", path, "--num-removed", "2", "--steps=5"])
    assert (settings.num_removed, settings.ratio, settings.steps, settings.epochs) == (2, None, 5, None)


@pytest.mark.parametrize(
    "text, value", [("1e-4", 1e-4), ("0.0001", 1e-4), ("1.0e-04", 1e-4)], ids=["YAML string", "float", "YAML float"]
)
def test_numbers_of_a_recipe_come_out_as_numbers(tmp_path, text, value):
    (tmp_path / "recipe.yaml").write_text(f"learning_rate: {text}\nlayers: 0,1,3\n")
    settings = parse_settings(["--recipe", str(tmp_path / "recipe.yaml")])
    assert settings.learning_rate == value
    assert settings.layers == "0,1,3"


def test_unknown_keys_of_a_recipe_are_named(tmp_path):
    path = recipe(tmp_path, seed=1, numb_removed=5, learning_rte=1.0)
    with pytest.raises(ValueError, match="recipe.yaml has unknown settings learning_rte, numb_removed. Known are"):
        parse_settings(["--recipe", path])


def test_a_recipe_names_no_other_recipe(tmp_path):
    with pytest.raises(ValueError, match="unknown settings recipe"):
        parse_settings(["--recipe", recipe(tmp_path, recipe="digits")])


@pytest.mark.parametrize("flags", [["--numb_removed", "5"], ["--num_rem", "5"], ["stray"]])
def test_unknown_flags_are_named(flags):
    with pytest.raises(ValueError, match=f"Unknown settings: {' '.join(flags)}"):
        parse_settings(flags)


@pytest.mark.parametrize(
    "content, message",
    [("- a\n- b\n", "must map settings to values, got list"), ("a: [\n", "is not YAML"), ("word", "got str")],
)
def test_recipes_that_are_none(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"recipe.yaml {message}" if "got str" not in message else message):
        parse_settings(["--recipe", str(tmp_path / "recipe.yaml")])


def test_an_empty_recipe_is_the_defaults(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# nothing\n")
    path = str(tmp_path / "recipe.yaml")
    assert parse_settings(["--recipe", path]) == Settings(recipe=path)


def test_a_recipe_that_is_not_there_lists_those_that_are(tmp_path):
    for name in ("nothing", str(tmp_path), str(tmp_path / "x.yaml")):
        with pytest.raises(ValueError, match="recipe must be one of .*digits.*, or a YAML file, got"):
            parse_settings(["--recipe", name])


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "ten"],
        ["--mask", "triple"],
        ["--criterion", "luck"],
        ["--device", "tpu"],
        ["--control", "3"],
        ["--num_calibration", "3.5"],
    ],
)
def test_values_of_another_type_end_with_usage_and_name_the_flag(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_settings(flags)
    assert ended.value.code == 2
    assert f"argument {flags[0]}" in capsys.readouterr().err


# Settings that exclude each other


@pytest.mark.parametrize("flags", [{"num_removed": "3"}, {"ratio": "0.25"}, {"layers": "0,2"}])
@pytest.mark.parametrize("in_recipe", [{"num_removed": 5}, {"ratio": 0.5}, {"layers": "1,3"}])
def test_a_flag_takes_the_place_of_its_group_in_the_recipe(tmp_path, flags, in_recipe):
    (name, value), path = next(iter(flags.items())), recipe(tmp_path, **in_recipe)
    for typed in ([f"--{name}", value], [f"--{name}={value}"]):
        settings = parse_settings(["--recipe", path, *typed])
        found = {key: getattr(settings, key) for key in EXCLUSIVE[0] if getattr(settings, key) is not None}
        assert {key: str(entry) for key, entry in found.items()} == flags


@pytest.mark.parametrize(
    "given_values",
    [{"num_removed": 3, "ratio": 0.2}, {"ratio": 0.2, "layers": "1"}, {"num_removed": 1, "layers": "1"}],
)
def test_two_of_a_group_are_refused_in_recipes_and_flags(tmp_path, given_values):
    message = f"Give one of num_removed, ratio and layers, got {' and '.join(given_values)}"
    with pytest.raises(ValueError, match=message):
        parse_settings(["--recipe", recipe(tmp_path, **given_values)])
    with pytest.raises(ValueError, match=message):
        parse_settings([f"--{name}={value}" for name, value in given_values.items()])


def test_steps_and_epochs(tmp_path):
    settings = parse_settings(["--epochs", "2.5"])
    assert (settings.steps, settings.epochs, settings.is_trained) == (0, 2.5, True)
    settings = parse_settings(["--recipe", recipe(tmp_path, epochs=2.0), "--steps", "8"])
    assert (settings.steps, settings.epochs, settings.is_trained) == (8, None, True)
    with pytest.raises(ValueError, match="epochs must be positive, and steps 0 beside it"):
        parse_settings(["--epochs", "2", "--steps", "8"])


def test_images_are_repeated_only_where_they_can_be_asked_for_again():
    with pytest.raises(ValueError, match="repeated_augmentation asks for images again, which a stream cannot"):
        Settings(streaming=True, repeated_augmentation=3)
    Settings(streaming=True, repeated_augmentation=1)
    Settings(repeated_augmentation=3)


def test_only_loader_processes_make_batches_ahead():
    with pytest.raises(ValueError, match="prefetch_factor is of loader processes: set num_workers"):
        Settings(prefetch_factor=4)
    Settings(prefetch_factor=4, num_workers=1)


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        parse_settings(["--resume", "--overwrite"])


@pytest.mark.parametrize("stages", ["", ",", "select,polish", "Select"])
def test_stages_that_are_none(stages):
    with pytest.raises(ValueError, match="stages must be among prepare,.*,report, got"):
        Settings(stages=stages)


# Numbers out of range


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_ratio_bounds(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\), got"):
        Settings(ratio=ratio)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("num_removed", 0, "at least 1, got 0"),
        ("num_removed", -2, "at least 1, got -2"),
        ("max_train_samples", 0, "at least 1, got 0"),
        ("max_eval_samples", -1, "at least 1, got -1"),
        ("num_calibration", 0, "at least 1, got 0"),
        ("batch_size", 0, "at least 1, got 0"),
        ("throughput_rounds", 1, "at least 2, for quartiles, got 1"),
        ("save_steps", 0, "at least 1, got 0"),
        ("shuffle_buffer_size", 0, "at least 1, got 0"),
        ("train_images", 0, "at least 1, got 0"),
        ("repeated_augmentation", 0, "at least 1, got 0"),
        ("prefetch_factor", 0, "at least 1, got 0"),
        ("crop_scale", 0.0, r"in \(0, 1\], got 0.0"),
        ("crop_scale", 1.5, r"in \(0, 1\], got 1.5"),
        ("crop_ratio", 0.5, "at least 1, got 0.5"),
        ("crop_ratio", float("inf"), "at least 1, got inf"),
        ("steps", -1, "0 or more, got -1"),
        ("seed", -1, "0 or more, got -1"),
        ("random_controls", -1, "0 or more, got -1"),
        ("epochs", 0.0, "positive"),
        ("epochs", -1.0, "positive"),
    ],
)
def test_numbers_out_of_range_are_named(name, value, message):
    with pytest.raises(ValueError, match=f"{name} must be .*{message}"):
        Settings(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 10, "decay": 11.0},
        {"steps": 10, "decay": 0.0},
        {"steps": 10, "decay": 2.5},
        {"epochs": 2.5, "unit": "epoch", "decay": 4.0},
    ],
)
def test_a_decay_that_does_not_end_is_refused_before_anything_is_trained(values):
    with pytest.raises(ValueError, match="decay must be"):
        Settings(**values)


def test_turns_that_do_not_fit_are_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="each of 3 layers a turn, but the decay has a length of 2"):
        Settings(steps=10, decay=2, order="ascending", num_removed=3)
    with pytest.raises(ValueError, match="one step or epoch for M to fall"):
        Settings(steps=10, decay=3, order="ascending", num_removed=3)
    Settings(steps=10, decay=3, order="ascending", num_removed=3, feature_compensation=False)
    Settings(steps=10, decay=6, order="ascending", num_removed=3)
    with pytest.raises(ValueError, match="one_shot removes all layers at once: it excludes order=descending"):
        Settings(steps=10, schedule="one_shot", order="descending")


def test_epochs_as_unit_need_epochs():
    with pytest.raises(ValueError, match="unit=epoch needs the length of training in epochs"):
        Settings(steps=10, unit="epoch")
    Settings(epochs=2.5, unit="epoch", decay=3.0)
    Settings(steps=10, decay=10.0)


# Feature compensation


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"steps": 5}, True),
        ({"epochs": 0.5}, True),
        ({"steps": 5, "schedule": "cosine"}, True),
        ({"steps": 5, "schedule": "one_shot"}, False),
        ({}, False),
        ({"steps": 5, "feature_compensation": False}, False),
        ({"steps": 5, "feature_compensation": True}, True),
        ({"feature_compensation": False}, False),
    ],
)
def test_compensation_is_on_where_there_is_training_that_it_can_live_through(values, expected):
    assert Settings(**values).uses_compensation is expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schedule", "one_shot", "--feature_compensation", "true"], "schedule=one_shot .* excludes"),
        (["--steps", "0", "--feature_compensation", "true"], "feature_compensation needs training"),
    ],
)
def test_compensation_that_would_destroy_the_model_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(flags)


def test_a_recipe_may_switch_compensation_off_and_a_flag_on_again(tmp_path):
    path = recipe(tmp_path, feature_compensation=False, steps=4)
    assert not parse_settings(["--recipe", path]).uses_compensation
    assert parse_settings(["--recipe", path, "--feature_compensation", "yes"]).uses_compensation


# settings.yaml


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "dataset_id": st.one_of(st.none(), st.just("user/name"), st.just("null"), st.just("3")),
        "control": st.booleans(),
        "flip": st.booleans(),
        "feature_compensation": st.sampled_from([None, False]),
        "learning_rate": st.floats(1e-8, 1.0),
        "min_learning_rate": st.floats(0, 1e-3),
        "max_eval_samples": st.one_of(st.none(), st.integers(1, 10**6)),
        "epochs": st.one_of(st.none(), st.floats(0.1, 400)),
        "mask": st.sampled_from(["skip", "double"]),
    },
)
REMOVED = st.sampled_from([{}, {"num_removed": 3}, {"ratio": 1 / 3}, {"layers": "11"}, {"layers": "0,10,4"}])


@given(values=VALUES, removed=REMOVED)
def test_saved_settings_repeat_the_run(tmp_path_factory, values, removed):
    path = tmp_path_factory.mktemp("run") / "settings.yaml"
    before = Settings(**values, **removed)
    path.write_text(before.to_yaml())
    after = parse_settings(["--recipe", str(path)])
    assert replace(after, recipe=before.recipe) == before
    assert after.to_yaml() == before.to_yaml()


def test_saved_settings_hold_all_but_those_of_one_call():
    values = yaml.safe_load(Settings(output_dir="/somewhere/private", resume=True).to_yaml())
    assert set(values) == set(asdict(Settings())) - set(OF_ONE_CALL)
    assert values["ratio"] is None and values["control"] is False


def run_folder(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(Settings(**values).to_yaml())
    return str(folder)


def test_resume_without_a_recipe_takes_the_folders_settings(tmp_path):
    folder = run_folder(tmp_path / "run", seed=5, num_removed=2, batch_size=3)
    settings = parse_settings(["--resume", "--output_dir", folder, "--batch_size", "4"])
    assert (settings.seed, settings.num_removed, settings.batch_size) == (5, 2, 4)
    assert settings.dense_steps == Settings.dense_steps
    assert settings.resume and str(settings.folder) == folder


def test_resume_with_a_recipe_takes_the_recipe(tmp_path):
    folder = run_folder(tmp_path / "run", seed=5)
    path = recipe(tmp_path, seed=6)
    for typed in (["--recipe", path], [f"--recipe={path}"]):
        assert parse_settings(["--resume", "--output_dir", folder, *typed]).seed == 6


def test_without_resume_the_folders_settings_play_no_part(tmp_path):
    folder = run_folder(tmp_path / "run", seed=5)
    assert parse_settings(["--output_dir", folder]).seed == Settings.seed


def test_resume_finds_the_folder_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "runs" / "vit-tiny", seed=5, model="someone/vit-tiny", num_removed=3)
    settings = parse_settings(["--resume", "--model", "someone/vit-tiny"])
    assert (settings.seed, settings.num_removed, settings.folder.as_posix()) == (5, 3, "runs/vit-tiny")


def test_resume_of_a_folder_that_is_not_there_starts_from_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_settings(["--resume"]) == replace(parse_settings([]), resume=True)
    run_folder(tmp_path / "runs" / "digits", seed=5)
    assert parse_settings(["--resume"]).seed == 5


def test_the_settings_of_a_folder_are_checked_like_a_recipe(tmp_path):
    folder = tmp_path / "run"
    run_folder(folder)
    with open(folder / "settings.yaml", "a") as file:
        file.write("from_the_future: 1\n")
    with pytest.raises(ValueError, match="settings.yaml has unknown settings from_the_future"):
        parse_settings(["--resume", "--output_dir", str(folder)])


# What depends on what


def test_every_setting_is_classified_once():
    names = {item.name for item in fields(Settings)}
    of_stages = {name for stage in DEPENDS for name in DEPENDS[stage].split()}
    assert set(DEPENDS) <= set(STAGES)
    assert of_stages | {*OF_ONE_CALL, *NO_RESULT} == names
    assert (
        not of_stages & set(OF_ONE_CALL) and not of_stages & set(NO_RESULT) and not set(OF_ONE_CALL) & set(NO_RESULT)
    )
    for stage in DEPENDS:
        assert len(set(DEPENDS[stage].split())) == len(DEPENDS[stage].split())
    assert set(OF_TRAINING.split()) == set(DEPENDS["prepare"].split()) & set(DEPENDS["dilute"].split()) - {"seed"}


def test_a_stage_that_trains_nothing_depends_on_nothing_of_training():
    trained, untrained = Settings(steps=4, dense_steps=1), Settings()
    for stage in ("prepare", "dilute"):
        assert set(trained.of_stage(stage)) - set(untrained.of_stage(stage)) == set(OF_TRAINING.split())
        assert not set(untrained.of_stage(stage)) & set(OF_TRAINING.split())
    assert {"dense_steps", "model", "seed"} <= set(untrained.of_stage("prepare"))
    assert {"steps", "epochs", "feature_compensation"} <= set(untrained.of_stage("dilute"))
    assert Settings(epochs=1.0).of_stage("dilute")["learning_rate"] == Settings.learning_rate


def test_every_setting_has_a_help_text():
    assert [item.name for item in fields(Settings) if not item.metadata.get("help", "").endswith(".")] == []


def test_packaged_recipes_are_valid():
    folder = recipe_path("digits").parent
    paths = sorted(folder.glob("*.yaml"))
    assert paths
    for path in paths:
        if path.stem == "cifar-probe":
            # A transfer's alone: the main job refuses it by the name of its key.
            with pytest.raises(ValueError, match="linear_probe"):
                parse_settings(["--recipe", path.stem])
            continue
        parse_settings(["--recipe", path.stem])
        assert not set(read_recipe(path)) & set(OF_ONE_CALL), path.name


def test_a_recipe_may_hold_lists(tmp_path):
    (tmp_path / "mine.yaml").write_text("layers: [0, 1, 3]\nstages: [prepare, profile]\nsteps: 4\n")
    settings = parse_settings(["--recipe", str(tmp_path / "mine.yaml")])
    assert settings.layers == "0,1,3" and settings.stage_list == ["prepare", "profile"]


def test_a_value_that_begins_with_a_dash_is_refused_by_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("num_removed: -1\n")
    with pytest.raises(ValueError, match="num_removed must be at least 1, got -1"):
        parse_settings(["--recipe", str(tmp_path / "mine.yaml")])


def test_trackers():
    assert parse_settings([]).trackers == []
    assert parse_settings(["--report_to", "tensorboard, wandb"]).trackers == ["tensorboard", "wandb"]
    with pytest.raises(ValueError, match="report_to must be none or among tensorboard,trackio,wandb, got 'paper'"):
        parse_settings(["--report_to", "paper"])


def test_cache():
    with pytest.raises(ValueError, match="cache_gib must be 0 or more, got -1.0"):
        parse_settings(["--cache_gib=-1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--state_cache_gib=-1"], "state_cache_gib must be 0 or more, got -1.0"),
        (["--state_cache_gib=inf"], "state_cache_gib must be 0 or more, got inf"),
        (["--search=racing", "--confidence=1"], r"confidence must be in \(0, 1\), got 1.0"),
        (["--search=racing", "--criterion=gaussian_kl"], "criterion 'gaussian_kl' cannot be raced"),
    ],
)
def test_the_search_is_checked_before_anything_is_trained(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(flags)
    assert parse_settings(["--search=racing"]).confidence == 0.99
