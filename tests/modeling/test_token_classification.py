"""Taggers: every token of a row as by its dense model, all tags of all experts as one distribution."""

from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline

from tests import tiny
from tests.modeling.dense import EXPERTS, MIXED, assert_close, dense_logits, row, stock
from tests.modeling.test_equivalence import padded, scattered
from twin_merging_hf.modeling.tags_twin_merging import union_tags


KINDS = ("bert-tokens", "roberta-tokens", "distilbert-tokens")
UNION = ["O", "B-a/PER", "I-a/PER", "B-b/LOC", "I-b/LOC", "B-b/PER", "c/noun", "c/verb"]
OWN = {"a": [0, 1, 2], "b": [3, 4, 0, 5], "c": [6, 7]}
"""Columns of each expert's tags, in its own order; column 0 is the `O` of both a and b."""
SAME = {"a": ["O", "B-PER", "I-PER"], "b": ["I-PER", "O", "B-PER"]}
ROWS = len(MIXED)


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def taggers(world):
    loaded: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in loaded:
            loaded[kind] = world.model(kind, tiny.TAGS)
        return loaded[kind]

    return get


@pytest.fixture
def model(taggers, kind) -> Any:
    """Read only."""
    return taggers(kind)


@pytest.fixture
def bert(taggers) -> Any:
    """Read only."""
    return taggers("bert-tokens")


def tokens_of(inputs: dict, index: int) -> int:
    return int(inputs["attention_mask"][index].sum())


# ---- label space ----------------------------------------------------------------------------------------------------


def test_tags_have_one_o_and_keep_their_chunk_prefix(model):
    assert list(model.label_space.labels) == UNION == model.config.label_names
    assert model.label_space.kind == "tags"
    assert [model.label_space.columns(t) for t in range(3)] == list(OWN.values())


def entry(name: str, *tags: str) -> dict:
    return {"name": name, "labels": list(tags), "problem_type": "token_classification"}


def test_chunk_schemes_of_more_letters_and_types_with_dashes():
    names, places = union_tags([entry("x", "S-a-b", "B-a-b", "E-a-b", "X-y", "O"), entry("y", "L-1", "no", "O")])
    assert names == ("S-x/a-b", "B-x/a-b", "E-x/a-b", "x/X-y", "O", "y/L-1", "y/no")
    assert places == ((0, 1, 2, 3, 4), (5, 6, 4))


def test_tags_without_o_have_none():
    assert union_tags([entry("x", "n", "v"), entry("y", "n", "o")])[0] == ("x/n", "x/v", "y/n", "y/o")


def test_names_that_would_meet_are_refused():
    with pytest.raises(ValueError, match=r"two tags would be called 'B-x/PER'.*rename expert 'B-x'"):
        union_tags([entry("x", "B-PER"), entry("B-x", "PER")])


# ---- equality with dense models -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_that_mixes_experts_gives_each_row_its_own_expert_s_stock_logits(world, kind, model):
    names = ["c", "a", "b", "b", "a", "c"]
    inputs, folder = tiny.batch(kind, ROWS), world.experts(kind, tiny.TAGS)
    output = model(**inputs, experts=names)
    assert output.logits.shape == output.expert_logits.shape == (ROWS, 9, len(UNION))
    for i, name in enumerate(names):
        own, n = stock(kind, folder / name)(**row(inputs, i)).logits[0], tokens_of(inputs, i)
        assert_close(output.expert_logits[i, :n, OWN[name]], own[:n], 1e-4)
        assert_close(output.logits[i, :n, OWN[name]], own[:n].log_softmax(-1), 1e-4)
        wrong = model(**row(inputs, i), experts="abc"[("abc".index(name) + 1) % 3]).expert_logits[0, :n, OWN[name][-1]]
        assert (wrong - own[:n, -1]).abs().max() > 1e-2  # so that the lines above can fail


@torch.no_grad()
def test_every_token_of_a_mixed_batch_equals_the_mixture_of_its_dense_models(world, kind, model):
    inputs, folder = tiny.batch(kind, ROWS), world.experts(kind, tiny.TAGS)
    output = model(**inputs, expert_weights=MIXED)
    for i, weights in enumerate(MIXED):
        n, prior = tokens_of(inputs, i), weights / weights.sum() if weights.sum() > 0 else torch.full((3,), 1 / 3)
        probability, raw_o = torch.zeros(n, len(UNION)), torch.zeros(n)
        for t, name in enumerate(EXPERTS):
            own = dense_logits(model, kind, folder, weights, name, row(inputs, i))[0, :n]
            for position, column in enumerate(OWN[name]):
                probability[:, column] += prior[t] * own.softmax(-1)[:, position]
                if column == 0:
                    raw_o += prior[t] * own[:, position]
                else:
                    assert_close(output.expert_logits[i, :n, column], own[:, position])
        assert_close(output.logits[i, :n].exp(), probability)
        assert_close(output.expert_logits[i, :n, 0], raw_o)


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, MIXED], ids=["routed", "given"])
def test_probabilities_of_every_token_sum_to_one(model, kind, weights):
    output = model(**tiny.batch(kind, ROWS), expert_weights=weights)
    assert_close(output.logits.exp().sum(-1), torch.ones(ROWS, 9))
    assert output.expert_weights.shape == (ROWS, 3)


@torch.no_grad()
def test_an_expert_without_o_gives_o_no_mass(bert):
    output = bert(**tiny.text_batch(2), experts="c")
    assert output.logits[..., 0].exp().max() < 1e-30 and bool((output.expert_logits[..., 0] == 0).all())


@torch.no_grad()
def test_one_set_of_tags_stays_as_it_is_and_is_mixed_by_name(world):
    kind, folder = "bert-tokens", world.experts("bert-tokens", SAME)
    model, inputs = world.model(kind, SAME), tiny.text_batch(1)
    assert list(model.label_space.labels) == SAME["a"] and model.label_space.kind == "same"
    for weights in (torch.tensor([[0.3, 0.7]]), torch.tensor([[1.0, 0.0]])):
        output = model(**inputs, expert_weights=weights)
        a, b = (dense_logits(model, kind, folder, weights[0], name, inputs) for name in "ab")
        b_ordered = b[..., [1, 2, 0]]  # O, B-PER, I-PER
        p, q = weights[0]
        assert_close(output.logits.exp(), p * a.softmax(-1) + q * b_ordered.softmax(-1))
        assert_close(output.expert_logits, p * a + q * b_ordered)


# ---- batch mates and padding ----------------------------------------------------------------------------------------


def answers(model: Any, inputs: dict, weights: torch.Tensor | None) -> torch.Tensor:
    output = model(**inputs, expert_weights=weights)
    return torch.cat([output.logits.exp(), output.expert_logits], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, MIXED], ids=["routed", "given"])
def test_padding_on_any_side_changes_no_token(model, weights):
    inputs = tiny.text_batch(ROWS)
    expected = answers(model, inputs, weights)
    moved, starts = scattered(inputs)
    cases = [(padded(inputs, 0, 5), [0] * ROWS), (padded(inputs, 5, 0), [5] * ROWS), (moved, starts.tolist())]
    for case, begins in cases:
        actual = answers(model, case, weights)
        for i, begin in enumerate(begins):
            n = tokens_of(inputs, i)
            assert_close(actual[i, begin : begin + n], expected[i, :n])


@torch.no_grad()
def test_a_row_alone_answers_as_in_a_batch(model):
    inputs = tiny.text_batch(ROWS)
    expected = answers(model, inputs, None)
    for i in range(ROWS):
        assert_close(
            answers(model, row(inputs, i), None)[0, : tokens_of(inputs, i)], expected[i, : tokens_of(inputs, i)]
        )


@torch.no_grad()
def test_all_experts_answer_every_token_also_of_padded_rows(bert):
    inputs = padded(tiny.text_batch(4), 3, 0)
    output = bert(**inputs, experts="all")
    assert output.logits.shape == (4, 3, 12, len(UNION)) and output.expert_weights.shape == (4, 3, 3)
    for t, name in enumerate(EXPERTS):
        assert_close(output.expert_logits[:, t], bert(**inputs, experts=name).expert_logits)


@torch.no_grad()
def test_experts_chosen_for_a_block_answer_in_it(bert):
    inputs = tiny.text_batch(3)
    expected = bert(**inputs, experts="b").logits
    with bert.use_experts("b"):
        assert torch.equal(bert(**inputs).logits, expected)
    assert not torch.equal(bert(**inputs, experts="a").logits, expected)


# ---- loss -----------------------------------------------------------------------------------------------------------


def tags_for(inputs: dict, seed: int = 0) -> torch.Tensor:
    """Labels in the union for every second token that is there, -100 elsewhere."""
    rng = torch.Generator().manual_seed(seed)
    tags = torch.randint(0, len(UNION), inputs["input_ids"].shape, generator=rng)
    tags[inputs["attention_mask"] == 0] = -100
    tags[:, ::2] = -100
    return tags


@torch.no_grad()
@pytest.mark.parametrize("left", [0, 4])
def test_the_loss_is_the_mean_negative_logit_of_the_tags(bert, left):
    inputs = padded(tiny.text_batch(ROWS), left, 0)
    labels = tags_for(inputs)
    output = bert(**inputs, labels=labels, expert_weights=MIXED)
    terms = [-output.logits[i, j, labels[i, j]] for i, j in (labels != -100).nonzero().tolist()]
    assert 10 < len(terms) < labels.numel() / 2
    assert_close(output.loss, torch.stack(terms).mean())
    given = bert(**inputs, labels=labels, expert_weights=MIXED, num_items_in_batch=100)
    assert_close(given.loss, torch.stack(terms).sum() / 100)
    assert bert(**inputs, labels=labels, return_dict=False)[0].dim() == 0


@pytest.mark.parametrize("labels", [torch.zeros(2, dtype=torch.long), torch.zeros(2, 8).long(), torch.zeros(2, 9)])
def test_labels_of_another_shape_or_type_are_refused(bert, labels):
    with pytest.raises(ValueError, match=r"`labels` must be integers \[batch, token\] = \[2, 9\]"):
        bert(**tiny.text_batch(2), labels=labels)


def test_labels_with_all_experts_are_refused(bert):
    with pytest.raises(ValueError, match="a row has one loss"):
        bert(**tiny.text_batch(2), labels=torch.zeros(2, 9).long(), experts="all")


def test_a_few_steps_lower_the_loss_and_reach_deltas_heads_and_router(world):
    model, inputs = world.model("bert-tokens", tiny.TAGS), tiny.text_batch(ROWS)
    torch.nn.init.zeros_(model.router.classifier.weight)
    labels, losses = tags_for(inputs), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert model.router.classifier.weight.grad.abs().max() > 0
        for name, parameter in model.named_parameters():
            if ".heads." in name or name.endswith((".up", ".down")):
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


# ---- loading --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_saving_and_loading_changes_nothing(world, tmp_path, model, kind):
    inputs = tiny.text_batch(3)
    AutoModelForTokenClassification.from_pretrained(world.artifact(kind, tiny.TAGS)).save_pretrained(tmp_path / "x")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "x").eval()
    assert torch.equal(answers(again, inputs, None), answers(model, inputs, None))
    body = AutoModel.from_pretrained(tmp_path / "x").eval()
    assert body(**inputs).last_hidden_state.shape == (3, 9, tiny.HIDDEN)


def test_other_classes_refuse_it_and_it_refuses_others(world):
    with pytest.raises(ValueError, match="`AutoModelForTokenClassification`"):
        AutoModelForSequenceClassification.from_pretrained(world.artifact("bert-tokens", tiny.TAGS))
    with pytest.raises(ValueError, match="`AutoModelForSequenceClassification`"):
        AutoModelForTokenClassification.from_pretrained(world.artifact("bert"))


def test_entries_of_another_problem_are_refused(bert):
    config = type(bert.config).from_dict(bert.config.to_dict())
    config.experts[0]["problem_type"] = "single_label_classification"
    with pytest.raises(ValueError, match="`problem_type` of the experts does not fit a shared BertForToken"):
        type(bert)(config)


# ---- pipeline -------------------------------------------------------------------------------------------------------

TEXTS = [" ".join(tiny.WORDS[9 * i : 9 * i + 3 + i % 4]) for i in range(10)]


@torch.no_grad()
def naive_groups(model: Any, tokenizer: Any, text: str) -> list[tuple]:
    """(tag type, start, end) by reading the argmax tags from left to right: B- begins, another type begins."""
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    ids = model(**encoded).logits[0].argmax(-1).tolist()
    groups: list[list] = []
    open_type = None
    for (start, end), i in zip(offsets, ids, strict=True):
        name = UNION[i]
        if start == end:
            continue  # special token
        kind = name[2:] if name[1:2] == "-" else name
        if name == "O":
            open_type = None
        elif kind == open_type and not name.startswith("B-"):
            groups[-1][2] = end
        else:
            groups.append([kind, start, end])
            open_type = kind
    return [tuple(group) for group in groups]


def test_the_pipeline_tags_and_groups(world):
    pipe = pipeline("token-classification", model=str(world.artifact("bert-tokens", tiny.TAGS)))
    chosen: set = set()
    for size in (1, 4):
        for expert in (None, "a", "b", "c"):
            with pipe.model.use_experts(expert if expert else {"a": 0.4, "b": 0.6}):
                answers = pipe(TEXTS, batch_size=size, aggregation_strategy="simple")
                for text, groups in zip(TEXTS, answers, strict=True):
                    found = [(group["entity_group"], group["start"], group["end"]) for group in groups]
                    assert found == naive_groups(pipe.model, pipe.tokenizer, text)
                    chosen |= {group[0] for group in found}
    assert {"b/LOC", "c/verb"} & chosen and len(chosen) > 3, chosen


def test_other_ways_of_grouping_run_and_words_are_named_by_the_union(world):
    pipe = pipeline("token-classification", model=str(world.artifact("bert-tokens", tiny.TAGS)))
    for strategy in ("none", "first", "average", "max"):
        with pipe.model.use_experts("c"):
            answers = pipe(TEXTS[:2], aggregation_strategy=strategy)
        key = "entity" if strategy == "none" else "entity_group"
        assert {entity[key] for row in answers for entity in row} <= {"c/noun", "c/verb"}
        assert all(answers)
