"""Cards of sources: anyone may have written them."""

import pytest

from twin_merging_hf.source_card import card_facts


FACTS = {
    "plain": ("---\nlicense: mit\ndatasets: [glue, imdb]\n---\nText", {"license": "mit", "datasets": ["glue", "imdb"]}),
    "one data set": ("---\ndatasets: glue\n---\n", {"datasets": ["glue"]}),
    "own licence": (
        "---\nlicense: other\nlicense_name: llama3\n---\n",
        {"license": "other", "license_name": "llama3"},
    ),
    "several licences": ("---\nlicense: [mit, gpl-3.0]\n---\n", {"license": ["mit", "gpl-3.0"]}),
    "no front matter": ("# Title\nlicense: mit\n", {}),
    "no text": ("", {}),
    "not yaml": ("---\nlicense: [\n---\n", {}),
    "a list": ("---\n- a\n---\n", {}),
    "other types": ("---\nlicense: 5\ndatasets: {a: b}\n---\n", {}),
    "control characters": ('---\nlicense: "a\\e[31m"\n---\n', {}),
    "very long": (f"---\nlicense: {'x' * 1000}\n---\n", {}),
    "a tag that would run code": ("---\nlicense: !!python/object/apply:os.system [exit]\n---\n", {}),
    "nested without end": ("---\nlicense: " + "[" * 100_000, {}),
    "a bomb of aliases": (
        "---\na0: &a0 [x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
        + "license: mit\n---\n",
        {},
    ),
    "a list that holds itself": ("---\nlicense: mit\na: &a [*a]\n---\n", {}),
}


@pytest.mark.parametrize("case", FACTS)
def test_what_a_card_says(tmp_path, case):
    text, expected = FACTS[case]
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert card_facts(tmp_path) == expected


def test_without_a_card_nothing_is_known(tmp_path):
    assert card_facts(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert card_facts(tmp_path) == {}


def test_at_most_a_hundred_data_sets(tmp_path):
    (tmp_path / "README.md").write_text(f"---\ndatasets: {[f'd{i}' for i in range(5000)]}\n---\n")
    assert len(card_facts(tmp_path)["datasets"]) == 100
