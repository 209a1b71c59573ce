"""
What a first-class library of this kind must do, row by row: the tests that hold each row, and those that no other file has.

`pytest tests/test_first_class.py -k row_16` says whether the tests of a row are there; run them by their own names.
"""

import ast
import concurrent.futures
import multiprocessing
from functools import cache
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.conftest import load
from tests.modeling.language import LanguageWorld


ROOT = Path(__file__).parent
ROWS: dict[str, list[str]] = {
    "01 import registers everything, once": [
        "test_public_api.py::every_auto_class_knows_its_model", "test_public_api.py::importing_again_is_harmless",
    ],
    "02 the plugin loads without a flag": ["modeling/test_loading.py::the_auto_classes_load_the_artifact"],
    "03 without the plugin, with the flag": ["test_remote_code.py::artifacts_load_answer_and_save_again"],
    "04 one artifact opens by every head": [
        "modeling/test_loading.py::the_model_without_heads_saves_the_whole_artifact",
        "test_artifact.py::the_backbone_alone_saves_the_whole_artifact_but_its_heads_load_too",
    ],
    "05 load, save, load changes no byte": ["test_artifact.py::loading_and_saving_changes_no_byte_for_any_architecture"],
    "06 the code that travels is flat": ["test_layering.py::the_rules_hold", "test_layering.py::a_planted_offence_is_found"],
    "07 configs survive a round trip": [
        "modeling/test_configuration.py::a_config_survives_a_round_trip_through_json",
        "modeling/test_configuration.py::the_shared_config_is_a_real_config_of_its_own_class",
    ],
    "08 impossible configs are refused": [
        "modeling/test_configuration.py::an_impossible_config_raises_and_names_the_field",
        "modeling/test_configuration.py::what_was_set_to_the_impossible_is_not_saved",
    ],
    "09 tied embeddings stay tied": ["modeling/test_language_models.py::copies_pickles_and_saved_models_write_the_same"],
    "10 nothing missing, nothing unexpected": ["modeling/test_loading.py::loading_info_comes_on_request"],
    "11 a missing key raises and is named": [
        "modeling/test_loading.py::a_missing_tensor_raises_and_is_named",
        "modeling/test_loading.py::a_missing_tensor_of_the_shared_model_raises_and_is_named",
    ],
    "12 logits survive saves and shards": [
        "modeling/test_loading.py::a_saved_model_loads_equal_with_its_companions",
        "modeling/test_loading.py::a_sharded_save_loads_equal", "test_artifact.py::weights_are_safetensors_only",
    ],
    "13 types": ["modeling/test_loading.py::narrow_types_keep_the_router_in_fp32_and_outputs_finite"],
    "14 devices and offloading": [
        "modeling/test_loading.py::a_device_map_of_one_device_gives_equal_outputs",
        "modeling/test_loading.py::disk_offload_gives_equal_outputs",
        "modeling/test_loading.py::offload_of_some_parts_only_gives_equal_outputs",
    ],
    "15 placement hints reach the wrapper": ["test_first_class.py::placement_hints_are_those_of_the_shared_model"],
    "16 a quantiser": ["modeling/test_quantised_shared.py::experts_act_on_a_quantised_shared_model"],
    "17 attention implementations": ["test_first_class.py::attention_implementations_reach_the_shared_model"],
    "18 one-hot is the merged expert": [
        "modeling/test_equivalence.py::one_hot_at_full_rank_is_that_expert_s_stock_model",
        "modeling/test_equivalence.py::every_row_of_a_mixed_batch_equals_its_dense_model",
    ],
    "19 error falls with rank": ["modeling/test_equivalence.py::the_error_of_answers_falls_monotonically_with_rank"],
    "20 rows do not depend on their batch": [
        "modeling/test_equivalence.py::a_row_alone_answers_as_in_a_batch",
        "modeling/test_equivalence.py::the_order_of_rows_changes_no_row",
        "modeling/test_equivalence.py::the_side_of_padding_changes_no_row",
    ],
    "21 mixed batches equal single rows": [
        "modeling/test_equivalence.py::a_batch_that_mixes_experts_gives_each_row_its_own_expert_s_stock_logits",
        "modeling/test_costs.py::factored_costs_its_share_of_ranks",
    ],
    "22 generation": [
        "modeling/test_generation.py::every_way_of_decoding_keeps_each_row_with_its_expert",
        "modeling/test_language_models.py::generate_routes_once_on_the_prompt_and_writes_as_with_the_same_weights_given",
        "modeling/test_language_models.py::chunked_prefill_and_prompt_lookup_write_the_same",
    ],
    "23 left padding and masks": ["modeling/test_language_models.py::padding_on_either_side_and_a_mask_left_out_route_alike"],
    "24 unknown names raise": ["modeling/test_choice.py::the_call_is_refused_naming_what_is_valid"],
    "25 encoder-decoders": ["modeling/test_generation.py::every_way_of_decoding_keeps_each_row_with_its_expert"],
    "26 pipelines": [
        "modeling/test_language_models.py::text_generation_pipelines_answer_in_any_batch_size_and_stream",
        "modeling/test_language_models.py::fill_mask_pipelines_fill_by_the_row_s_expert",
        "modeling/test_token_classification.py::the_pipeline_tags_and_groups",
    ],
    "27 outputs have the batch first": [
        "modeling/test_outputs.py::outputs_have_batch_first_and_one_column_for_each_label_and_expert",
    ],
    "28 a head for each task": ["modeling/test_heads.py::different_labels_make_a_union_in_the_order_of_experts"],
    "29 Trainer": [
        "modeling/test_language_training.py::trainer_lowers_the_loss_aligns_special_tokens_and_saves",
        "modeling/test_loss.py::num_items_in_batch_divides_the_sum_of_losses",
    ],
    "30 activation checkpointing": ["modeling/test_training_modes.py::activation_checkpointing_gives_the_same_gradients"],
    "31 torch.compile": [
        "modeling/test_training_modes.py::"
        "a_compiled_model_gives_equal_outputs_for_any_given_weights_without_compiling_again",
    ],
    "32 copies and pickles": ["modeling/test_threads.py::a_copy_behaves_as_the_model_and_is_independent"],
    "33 PEFT around the artifact": ["test_first_class.py::peft_trains_around_an_artifact"],
    "34 LoRA experts": [
        "test_lora.py::the_artifact_equals_peft_with_patterns_and_rank_stabilised_scale",
        "test_lora.py::adapters_that_are_no_plain_lora_are_refused_with_a_remedy",
        "modeling/test_live_editing.py::a_loaded_expert_is_there_as_by_the_command",
    ],
    "35 LoRAs out of it": [
        "test_export.py::loras_in_peft_are_the_artifact_to_rounding_where_everything_is_carried",
        "test_export.py::vllms_rules_are_checked_by_us",
    ],
    "36 merging": ["test_export.py::a_merged_checkpoint_is_the_artifact_under_fixed_weights"],
    "37 every tensor is accounted for": [
        "test_separation.py::every_tensor_is_accounted_for",
        "test_separation.py::a_delta_without_rule_fails_and_the_line_in_the_message_helps",
    ],
    "38 checks before work": [
        "test_preflight.py::all_problems_are_listed_at_once", "test_preflight.py::tokenizers_that_differ",
        "test_lora.py::a_base_of_other_weights_is_refused_and_the_same_weights_elsewhere_are_not",
        "test_compression.py::where_lapack_fails_in_single_precision_double_helps",
    ],
    "39 the card": [
        "hub_upload/test_model_card.py::the_hub_can_read_it",
        "hub_upload/test_upload.py::push_to_hub_carries_the_whole_artifact_and_its_card",
    ],
    "40 the Hub": [
        "hub_upload/test_upload.py::from_command_to_pipeline_with_and_without_plugin_and_network",
        "hub_upload/test_upload.py::doing_it_again_changes_nothing",
        "hub_upload/test_upload.py::a_bad_token_is_explained_and_not_shown",
    ],
}  # fmt: skip


@cache
def _names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {item.name.removeprefix("test_") for item in tree.body if isinstance(item, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "row_" + row.replace(" ", "_"))
def test_row(row):
    missing = [name for name in ROWS[row] if name.split("::")[1] not in _names_in(name.split("::")[0])]
    assert missing == []


def test_every_row_has_its_number():
    assert [int(row.split()[0]) for row in ROWS] == list(range(1, 41))


# ---- rows that no other file has -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return LanguageWorld(tmp_path_factory.mktemp("rows"))


def test_placement_hints_are_those_of_the_shared_model(language):
    model = language.model("llama-lm")
    assert "LlamaDecoderLayer" in set(model._no_split_modules)
    assert set(model.shared._skip_keys_device_placement) <= set(model._skip_keys_device_placement)


@torch.no_grad()
def test_attention_implementations_reach_the_shared_model(world):
    artifact, batch = world.artifact("bert"), tiny.batch("bert", 3)
    found = {}
    for name in ("eager", "sdpa"):
        model = load(artifact, attn_implementation=name)
        assert model.shared.config._attn_implementation == name
        found[name] = model(**batch).logits
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=0, atol=1e-5)
    model.set_attn_implementation("eager")
    assert model.shared.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**batch).logits, found["eager"], rtol=0, atol=1e-6)


def test_peft_trains_around_an_artifact(language):
    peft = pytest.importorskip("peft")
    model = language.model("llama-lm")
    settings = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    batch = tiny.batch("llama-lm", 4)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.05), []
    for _ in range(6):
        loss = adapted(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and all(".lora_" in n for n, w in adapted.named_parameters() if w.requires_grad)
    adapted.eval()
    written = adapted.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written.shape == (4, batch["input_ids"].shape[1] + 3)


# ---- many at once ----------------------------------------------------------------------------------------------------

_THREADS, _PROCESSES, _CALLS = 8, 4, 12


def _answers(model, seed: int) -> list[torch.Tensor]:
    """Calls of many kinds, as one user makes them: routed, by name, for all experts, within `use_experts`."""
    found = []
    with torch.no_grad():
        for i in range(_CALLS):
            batch, name = tiny.batch("bert", 1 + (seed + i) % 4, seed=seed * 100 + i), "abc"[(seed + i) % 3]
            if i % 4 == 3:
                with model.use_experts(name):
                    found.append(model(**batch).logits)
            else:
                call = ({}, {"experts": name}, {"experts": "all"})[i % 4]
                found.append(model(**batch, **call).logits)
    return found


def _serve(folder: Path, seed: int) -> list:
    torch.set_num_threads(1)
    return [logits.tolist() for logits in _answers(load(folder), seed)]


def test_eight_threads_of_one_model_answer_as_one_after_the_other(world):
    model = world.model("bert")
    expected = [_answers(model, seed) for seed in range(_THREADS)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda seed: _answers(model, seed), range(_THREADS)))
    for mine, alone in zip(found, expected, strict=True):
        for logits, wanted in zip(mine, alone, strict=True):
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-6)


def test_four_processes_serve_one_artifact_as_one_does(world):
    folder = world.artifact("bert")
    model = load(folder)
    with concurrent.futures.ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_serve, [folder] * _PROCESSES, range(_PROCESSES)))
    for seed, mine in enumerate(found):
        for logits, wanted in zip(mine, _answers(model, seed), strict=True):
            torch.testing.assert_close(torch.tensor(logits), wanted, rtol=0, atol=1e-6)
