"""Theorem: in a batch that mixes experts every row is written as by its own expert alone, however it is decoded."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoTokenizer

from tests import tiny
from tests.modeling.language import GREEDY, MASKED, NAMES, TIED, LanguageWorld, prompts, side_of


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageWorld]:
    yield LanguageWorld(tmp_path_factory.mktemp("language"))


def expected(language: LanguageWorld, kind: str, tied: bool, inputs: dict, **options) -> list[torch.Tensor]:
    """What each row's own expert writes, alone and with its padding."""
    found = []
    for row, name in enumerate(NAMES):
        single = {key: value[row : row + 1] for key, value in inputs.items()}
        found.append(language.stock(kind, name, tied).generate(**single, **GREEDY, **options))
    return found


def rows_of(output: torch.Tensor, each: int) -> list[torch.Tensor]:
    return list(output.split(each))


@pytest.mark.parametrize(("kind", "tied"), [pair for pair in TIED if pair[0] not in MASKED])
def test_a_batch_that_mixes_four_experts_is_written_token_for_token_as_by_each_alone(language, kind, tied):
    model, inputs = language.model(kind, tied), prompts(side=side_of(kind))
    written = model.generate(**inputs, experts=NAMES, **GREEDY)
    alone = expected(language, kind, tied, inputs)
    for mine, other in zip(rows_of(written, 1), alone, strict=True):
        assert mine.tolist() == other.tolist()
    wrong = model.generate(**inputs, experts=NAMES[::-1], **GREEDY)
    assert wrong.tolist() != written.tolist(), "experts that write alike prove nothing"
    assert len({tuple(row.flatten().tolist()[-GREEDY["max_new_tokens"] :]) for row in alone}) == len(NAMES)


DECODING = {
    "beams": {"num_beams": 3},
    "sequences": {"num_beams": 4, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", DECODING)
@pytest.mark.parametrize("kind", ["llama-lm", "gpt2-lm", "t5-lm", "bart-lm"])
def test_every_way_of_decoding_keeps_each_row_with_its_expert(language, kind, way):
    options = DECODING[way]
    model, inputs = language.model(kind), prompts(side=side_of(kind))
    written = model.generate(**inputs, experts=NAMES, **GREEDY, **options)
    alone = expected(language, kind, True, inputs, **options)
    for mine, other in zip(rows_of(written, options.get("num_return_sequences", 1)), alone, strict=True):
        assert mine.tolist() == other.tolist()


@pytest.mark.parametrize("kind", ["llama-lm", "gpt2-lm"])
def test_guidance_runs_its_second_pass_by_the_row_s_expert_too(language, kind):
    model, inputs = language.model(kind), prompts(side="left")
    options = {"guidance_scale": 2.0, "num_beams": 2, "num_return_sequences": 2}
    written = model.generate(**inputs, experts=NAMES, **GREEDY, **options)
    for mine, other in zip(rows_of(written, 2), expected(language, kind, True, inputs, **options), strict=True):
        assert mine.tolist() == other.tolist()


@pytest.mark.parametrize("kind", ["llama-lm", "gpt2-lm"])
def test_prompts_may_be_embeddings(language, kind):
    model, inputs = language.model(kind), prompts(side="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    routed = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    prompt = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    for more in ({}, {"input_ids": ids}):
        output = model.generate(**prompt, **more, **GREEDY, return_dict_in_generate=True)
        torch.testing.assert_close(output.expert_weights, routed.expert_weights)
    for row, name in enumerate(NAMES):
        stock = language.stock(kind, name)
        single = {
            "inputs_embeds": stock.get_input_embeddings()(ids[row : row + 1]),
            "attention_mask": mask[row : row + 1],
        }
        written = model.generate(**single, experts=name, **GREEDY)
        assert written.tolist() == stock.generate(**single, **GREEDY).tolist()


@pytest.mark.parametrize("kind", ["llama-lm", "t5-lm"])
def test_strings_may_end_a_text(language, kind):
    model, stock, inputs = language.model(kind), language.stock(kind, "a"), prompts(rows=1, side=side_of(kind))
    tokenizer = AutoTokenizer.from_pretrained(language.artifact(kind))
    tokenizer.add_tokens("abcdef")  # Transformers looks how a token reads behind this word
    whole = stock.generate(**inputs, **GREEDY)
    end = tokenizer.decode(whole[0, -4])
    options = {"stop_strings": [end], "tokenizer": tokenizer, "max_new_tokens": 8}
    written = model.generate(**inputs, experts="a", no_repeat_ngram_size=1, **options)
    assert written.tolist() == stock.generate(**inputs, no_repeat_ngram_size=1, **options).tolist()
    assert written.shape[1] < whole.shape[1]


@pytest.mark.parametrize("kind", ["llama-lm", "t5-lm"])
@pytest.mark.parametrize("draft", ["stock", "itself"])
def test_another_model_may_draft(language, kind, draft):
    model, inputs = language.model(kind), prompts(rows=1, side=side_of(kind))
    assistant = model if draft == "itself" else language.stock(kind, "b")
    written = model.generate(**inputs, experts="a", max_new_tokens=8, assistant_model=assistant)
    assert written.tolist() == language.stock(kind, "a").generate(**inputs, max_new_tokens=8).tolist()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "tied"), TIED)
def test_one_forward_over_experts_equals_their_stock_logits_at_full_rank(language, kind, tied):
    model, inputs = language.model(kind, tied), prompts(side="right")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = prompts(seed=1)["input_ids"].clamp(min=len(tiny.SPECIAL))
    output = model(**inputs, experts=NAMES)
    for row, name in enumerate(NAMES):
        single = {key: value[row : row + 1] for key, value in inputs.items()}
        reference = language.stock(kind, name, tied)(**single).logits
        valid = slice(None) if model.config.is_encoder_decoder else single["attention_mask"][0] > 0
        torch.testing.assert_close(output.logits[row, valid], reference[0, valid], atol=1e-4, rtol=0)
