"""Whose words a card holds, and what is filled in where it goes."""

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from hf_nose.card_text import (
    addressed_card,
    completed_card,
    drop_exports,
    has_words,
    is_own,
    marked,
    own_card,
    repository_name,
)


CODE = """---
tags:
- hf_nose
---

# x

```python
AutoImageProcessor.from_pretrained("YOUR_NAME/x.y-1")
model = M.from_pretrained("YOUR_NAME/x.y-1", trust_remote_code=True)
stock = M.from_pretrained("YOUR_NAME/x.y-1", revision="stock")
```

hf-nose transfer --model YOUR_NAME/x.y-1 --epochs 10. Or YOUR_NAME/x.y-1.
"""


@given(st.text(), st.data())
def test_any_change_makes_a_card_somebodys_own(text, data):
    card = marked(text)
    assert card.startswith(text) and not is_own(card) and is_own(text)
    at = data.draw(st.integers(0, len(card)))
    assert is_own(card[:at] + data.draw(st.text(min_size=1)) + card[at:])
    assert is_own(card[:at] + card[at + 1 :]) or at == len(card)


def test_the_mark_holds_no_number_and_is_not_seen():
    line = marked("# x\n").splitlines()[-1]
    assert line.startswith("<!--") and line.endswith("-->") and not any(letter.isdigit() for letter in line)


def test_a_card_loads_the_repository_that_it_stands_in():
    card = addressed_card(CODE, "me/it")
    assert "YOUR_NAME" not in card and card.count("me/it") == 5 and 'from_pretrained("me/it")' in card
    assert card.endswith("--model me/it --epochs 10. Or me/it.\n") and card.count("revision") == 1
    assert addressed_card(CODE, "me/it", "main") == card == addressed_card(card, "other/one", "half")


def test_the_card_of_a_variant_loads_the_variant():
    card = addressed_card(CODE, "me/it", "half/way")
    assert card.count('"me/it", revision="half/way"') == 2 and card.count('"me/it", revision="stock"') == 1
    assert '"me/it", revision="half/way", trust_remote_code=True)' in card


def test_a_branch_of_any_name():
    """It is a replacement, not a pattern."""
    text = addressed_card('load("YOUR_NAME/vit")', "me/vit", "é\\1")
    assert text == 'load("me/vit", revision="é\\\\1")'


@pytest.mark.parametrize("metadata", ["2024: x", "yes: 1", "[a]", "a: [b"])
def test_metadata_that_are_none(metadata):
    with pytest.raises(ValueError, match="metadata of README.md are not plain YAML"):
        completed_card(f"---\n{metadata}\n---\n# b\n", None, "NoseViTForImageClassification")


def test_what_is_filled_in_is_nobodys_words():
    for function, words in ((addressed_card, ["me/it"]), (completed_card, ["a/b", "NoseViTModel"])):

        def change(card, function=function, words=words):
            return function(card, *words)

        assert not is_own(change(marked(CODE))) and is_own(change(CODE)) and is_own(change(marked(CODE) + "Mine."))
        assert change(marked(CODE)).count("<!--") == 1
    assert ModelCard(completed_card(marked(CODE), "a/b", "NoseViTModel")).data.base_model == "a/b"


def test_a_card_of_metadata_alone_says_nothing():
    assert not any(map(has_words, ("", "---\nlicense: mit\n---\n", "---\nlicense: mit\n---", "---\n---\n\n")))
    assert all(
        map(has_words, ("Mine", "---\nlicense: mit\n---\nMine", "---\na: !!python/x [y]\n---\nMine", "---\nMine"))
    )


def test_names():
    assert repository_name("deit-b-nose40") == "deit-b-nose40"
    assert repository_name("my run (2)") == "my-run-2" and repository_name("../..") == "nose-vit"


def test_exports_go_but_for_the_cards_that_somebody_has_changed(tmp_path):
    exports, outside = tmp_path / "export", tmp_path / "outside"
    outside.mkdir()
    (outside / "README.md").write_text("Of somebody else.")
    for name, text in (("hf", marked("# x\n") + "Mine.\n"), ("stock-vit", marked("# x\n"))):
        (exports / name / "figures").mkdir(parents=True)
        (exports / name / "figures" / "a.png").write_bytes(b"")
        (exports / name / "README.md").write_text(text)
    (exports / "link").symlink_to(outside)
    (exports / "hf" / "link").symlink_to(outside)
    assert drop_exports(exports) == [exports / "hf" / "README.md"]
    assert sorted(exports.rglob("*")) == [exports / "hf", exports / "hf" / "README.md"]
    assert own_card(exports / "hf") == marked("# x\n") + "Mine.\n"
    (exports / "hf" / "README.md").unlink()
    assert drop_exports(exports) == [] and not exports.exists()
    exports.symlink_to(outside)
    assert drop_exports(exports) == [] and not exports.is_symlink()
    assert (outside / "README.md").read_text() == "Of somebody else."
