"""Language models in use: when they route, what goes with a row, what they refuse, and what they cost a caller to know."""

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer, pipeline

from tests import tiny
from tests.modeling.language import GREEDY, NAMES, LanguageWorld, prompts, side_of
from twin_merging_hf.modeling import TwinMergingModel
from twin_merging_hf.modeling.shared_twin_merging import refuse_unservable


GENERATORS = ["llama-lm", "gpt2-lm", "t5-lm", "bart-lm"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w89 {% endif %}"


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> LanguageWorld:
    return LanguageWorld(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def llama(language: LanguageWorld) -> Any:
    return language.model("llama-lm")


@pytest.fixture(scope="module")
def routed(language: LanguageWorld) -> Any:
    """Llama whose router knows each expert's words."""
    return language.model("llama-lm", data=True)


def words_of(expert: int, count: int = 5) -> str:
    return " ".join(tiny.WORDS[expert * 22 : expert * 22 + count])


# ---- routing once ---------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
    "chunked": {"prefill_chunk_size": 3},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", GENERATORS)
def test_generate_routes_once_on_the_prompt_and_writes_as_with_the_same_weights_given(language, kind, way, monkeypatch):
    if way == "chunked" and kind in ("t5-lm", "bart-lm"):
        pytest.skip("only prompts of decoders are filled in chunks")
    model, inputs = language.model(kind), prompts(side=side_of(kind))
    calls: Counter = Counter()
    weigh = model._weights_of  # once for each routing, whatever the router does with its features
    monkeypatch.setattr(model, "_weights_of", lambda *states: calls.update(routing=1) or weigh(*states))
    options = {**GREEDY, **WAYS[way], "return_dict_in_generate": True}
    by_itself = model.generate(**inputs, **options)
    assert calls.pop("routing") == 1
    torch.testing.assert_close(by_itself.expert_weights, model.route(**inputs))
    calls.clear()
    given = model.generate(**inputs, **options, expert_weights=by_itself.expert_weights)
    assert calls["routing"] == 0
    assert given.sequences.tolist() == by_itself.sequences.tolist()


def test_padding_on_either_side_and_a_mask_left_out_route_alike(llama):
    left, right = prompts(side="left"), prompts(side="right")
    for row in range(len(NAMES)):
        own = left["input_ids"][row][left["attention_mask"][row] > 0]
        right["input_ids"][row, : len(own)] = own
    expected = llama.route(**left)
    torch.testing.assert_close(llama.route(**right), expected)
    output = llama.generate(left["input_ids"], **GREEDY, return_dict_in_generate=True)
    torch.testing.assert_close(output.expert_weights, expected)
    alone = left["input_ids"][1:2, 2:]
    torch.testing.assert_close(llama.route(input_ids=alone), expected[1:2])


def test_sampling_draws_as_the_stock_model_does(language, llama):
    inputs, options = prompts(rows=1), {"do_sample": True, "max_new_tokens": 8}
    torch.manual_seed(0)
    mine = llama.generate(**inputs, experts="b", **options)
    torch.manual_seed(0)
    assert mine.tolist() == language.stock("llama-lm", "b").generate(**inputs, **options).tolist()


def test_chunked_prefill_and_prompt_lookup_write_the_same(llama):
    inputs = prompts(rows=1)
    expected = llama.generate(**inputs, experts="c", **GREEDY).tolist()
    assert llama.generate(**inputs, experts="c", **GREEDY, prefill_chunk_size=2).tolist() == expected
    assert llama.generate(**inputs, experts="c", **GREEDY, prompt_lookup_num_tokens=2).tolist() == expected


# ---- a conversation -------------------------------------------------------------------------------------------------


def test_a_forward_that_goes_on_from_a_cache_keeps_its_mixture(llama):
    ids = prompts(rows=2, tokens=8)["input_ids"].clamp(min=len(tiny.SPECIAL))
    weights = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0]])
    whole = llama(input_ids=ids, expert_weights=weights)
    start = llama(input_ids=ids[:, :5], expert_weights=weights, use_cache=True)
    with pytest.raises(ValueError, match="holds the states of the mixture that filled it"):
        llama(input_ids=ids[:, 5:], past_key_values=start.past_key_values)
    rest = llama(input_ids=ids[:, 5:], past_key_values=start.past_key_values, expert_weights=start.expert_weights)
    torch.testing.assert_close(rest.logits, whole.logits[:, 5:], atol=1e-5, rtol=0)


def test_an_empty_cache_does_not_hinder_routing_and_is_not_filled_by_it(llama):
    ids = prompts(rows=2)["input_ids"].clamp(min=len(tiny.SPECIAL))
    cache = DynamicCache(config=llama.config.get_text_config(decoder=True))
    output = llama(input_ids=ids, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(output.expert_weights, llama.route(input_ids=ids))


def test_a_second_turn_needs_the_first_one_s_weights_or_a_new_cache(llama):
    ids = prompts(rows=1)["input_ids"]
    options = {**GREEDY, "return_dict_in_generate": True}
    first = llama.generate(ids, **options)
    longer = torch.cat([first.sequences, ids[:, :2]], dim=1)
    with pytest.raises(ValueError, match="start again without the cache"):
        llama.generate(longer, past_key_values=copy.deepcopy(first.past_key_values), **options)
    kept = llama.generate(longer, past_key_values=first.past_key_values, expert_weights=first.expert_weights, **options)
    from_start = llama.generate(longer, expert_weights=first.expert_weights, **options)
    assert kept.sequences.tolist() == from_start.sequences.tolist()
    assert llama.generate(longer, **options).expert_weights.shape == (1, len(NAMES))


# ---- pipelines and streams ------------------------------------------------------------------------------------------


def test_text_generation_pipelines_answer_in_any_batch_size_and_stream(language, routed, capsys):
    folder = language.artifact("llama-lm", data=True)
    pipe = pipeline("text-generation", model=str(folder))
    pipe.tokenizer.padding_side = "left"
    rows = [words_of(i, 3 + i) for i in range(4)]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_full_text": False}
    single = pipe(rows, batch_size=1, **options)
    assert pipe(rows, batch_size=4, **options) == single
    with pipe.model.use_experts("d"):
        forced = pipe(rows, batch_size=4, **options)
    assert forced == pipe(rows, batch_size=2, experts="d", **options) != single
    assert forced[3] == single[3], "the last row is the fourth expert's own"
    inputs = pipe.tokenizer(rows[0], return_tensors="pt")
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True)
    pipe.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.split() == single[0][0]["generated_text"].split()


def test_a_chat_goes_through_the_template_and_is_routed_on_it(language, routed):
    pipe = pipeline("text-generation", model=str(language.artifact("llama-lm", data=True)))
    pipe.tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": words_of(2)}]
    answer = pipe(chat, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert [message["role"] for message in answer] == ["user", "assistant"]
    ids = pipe.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    written = language.stock("llama-lm", "c").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert int(routed.route(input_ids=ids).argmax()) == 2
    with pipe.model.use_experts("c"):
        given = pipe(chat, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert given[1]["content"] == pipe.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_fill_mask_pipelines_fill_by_the_row_s_expert(language):
    pipe = pipeline("fill-mask", model=str(language.artifact("bert-lm", data=True)), top_k=1)
    rows = [f"{words_of(i)} [MASK]" for i in range(4)]
    for index, name in enumerate(NAMES):
        stock = pipeline("fill-mask", model=language.stock("bert-lm", name), tokenizer=pipe.tokenizer, top_k=1)
        with pipe.model.use_experts(name):
            assert pipe(rows[index])[0]["token"] == stock(rows[index])[0]["token"]
    assert len(pipe(rows, batch_size=4)) == 4


# ---- forwards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-lm", "gpt2-lm", "t5-lm", "bart-lm", "bert-lm"])
def test_a_loss_is_the_stock_one_and_reaches_the_deltas(language, kind):
    model, inputs = language.model(kind), prompts(rows=2, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.zero_grad()
    output = model(**inputs, labels=labels, experts="b")
    expected = language.stock(kind, "b")(**inputs, labels=labels).loss
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.deltas.parameters() if p.grad is not None)
    assert sum(float(p.grad.abs().sum()) for p in model.deltas.parameters() if p.grad is not None) > 0
    assert model.accepts_loss_kwargs == (kind in ("llama-lm", "gpt2-lm"))
    if model.accepts_loss_kwargs:
        doubled = model(**inputs, labels=labels, experts="b", num_items_in_batch=2).loss
        summed = language.stock(kind, "b")(**inputs, labels=labels, num_items_in_batch=2).loss
        torch.testing.assert_close(doubled, summed, atol=1e-4, rtol=0)


@torch.no_grad()
def test_masked_models_change_nothing_by_padding_on_the_left(language):
    model, right = language.model("bert-lm"), prompts(side="right")
    moved = right["attention_mask"].flip(1)
    labels = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    left = {"input_ids": torch.zeros_like(right["input_ids"]), "attention_mask": moved}
    left["input_ids"][moved > 0] = right["input_ids"][right["attention_mask"] > 0]
    shifted = torch.full_like(labels, -100)
    shifted[moved > 0] = labels[right["attention_mask"] > 0]
    one, other = model(**right, labels=labels, experts=NAMES), model(**left, labels=shifted, experts=NAMES)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.logits[right["attention_mask"] > 0], other.logits[moved > 0], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama-lm", "t5-lm", "bert-lm"])
def test_all_answers_each_row_by_every_expert(language, kind):
    model, inputs = language.model(kind), prompts(rows=2, side="right")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.full((2, 3), 7)
    every = model(**inputs, experts="all")
    assert every.logits.shape[:2] == (2, len(NAMES))
    for index, name in enumerate(NAMES):
        torch.testing.assert_close(every.logits[:, index], model(**inputs, experts=name).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="`labels` cannot be given together"):
        model(**inputs, experts="all", labels=inputs["input_ids"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experts": "e"}, "unknown expert 'e'; this model has a, b, c, d"),
        ({"experts": "all"}, "repeat the prompts and name the experts"),
        ({"expert_weight": torch.ones(1, 4)}, "expert_weight"),
        ({"expert_weights": torch.ones(3, 4)}, "for 3 rows, but the batch has 4"),
        ({"experts": ["a", "b"]}, "names 2 rows"),
    ],
)
def test_generate_refuses_what_it_does_not_know(llama, options, says):
    with pytest.raises(ValueError, match=says):
        llama.generate(**prompts(), **GREEDY, **options)


def test_prompts_are_not_packed_into_one_row(llama):
    with pytest.raises(ValueError, match="continuous batching is not supported"):
        llama.generate_batch(inputs=[[5, 6, 7], [8, 9]])


def test_generate_and_forwards_without_a_prompt_say_so(language, llama):
    with pytest.raises(ValueError, match="`generate` needs a prompt"):
        llama.generate(max_new_tokens=2)
    model = language.model("t5-lm")
    encoded = model.get_encoder()(**prompts(side="right"))
    with pytest.raises(ValueError, match="routing needs the prompt"):
        model(encoder_outputs=encoded, decoder_input_ids=torch.zeros(4, 1, dtype=torch.long))


@torch.no_grad()
def test_copies_pickles_and_saved_models_write_the_same(language, llama, tmp_path):
    inputs = prompts()
    expected = llama.generate(**inputs, experts=NAMES, **GREEDY).tolist()
    llama.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert saved.shared.lm_head.weight is saved.shared.model.embed_tokens.weight
    for model in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama)), saved):
        assert model.generate(**inputs, experts=NAMES, **GREEDY).tolist() == expected


@torch.no_grad()
def test_auto_model_gives_a_decoder_s_states_and_refuses_an_encoder_decoder_s(language, llama):
    inputs = prompts(side="right")
    body = TwinMergingModel.from_pretrained(language.artifact("llama-lm")).eval()
    states = body(**inputs, experts=NAMES).last_hidden_state
    torch.testing.assert_close(llama.shared.lm_head(states[:1]).shape, llama(**inputs).logits[:1].shape)
    body = TwinMergingModel.from_pretrained(language.artifact("t5-lm"))
    with pytest.raises(ValueError, match="AutoModelForSeq2SeqLM"):
        body(**inputs)


def test_tokenizers_of_other_families_may_add_token_types(language, llama):
    tokenizer = AutoTokenizer.from_pretrained(language.artifact("llama-lm"))
    inputs = tokenizer(words_of(0), return_tensors="pt", return_token_type_ids=True)
    assert llama.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"]


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "MambaForCausalLM": "MambaConfig",
    "RwkvForCausalLM": "RwkvConfig",
    "XLNetLMHeadModel": "XLNetConfig",
    "EncoderDecoderModel": None,
    "Qwen2AudioForConditionalGeneration": "Qwen2AudioConfig",
    "BartForSequenceClassification": "BartConfig",
    "T5ForSequenceClassification": "T5Config",
}
REASONS = "keeps a recurrent state|reads more than text|is made of several|reads its answer from a decoder"


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_mixture_per_row_is_refused_with_its_reason(name):
    if REFUSED[name] is None:
        encoder, decoder = (transformers.BertConfig().to_dict() for _ in range(2))  # older releases take entries out
        config = transformers.EncoderDecoderConfig(encoder=encoder, decoder=decoder)
    else:
        config = getattr(transformers, REFUSED[name])()
    with pytest.raises(ValueError, match=f"{name} ({REASONS})"):
        refuse_unservable(getattr(transformers, name), config)
