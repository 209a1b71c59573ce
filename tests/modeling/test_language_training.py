"""Language models in Trainer: deltas learn, predictions come back, and what is saved is the artifact again."""

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tests.modeling.language import LanguageWorld, prompts


def test_trainer_lowers_the_loss_aligns_special_tokens_and_saves(tmp_path):
    language = LanguageWorld(tmp_path / "language")
    folder = language.artifact("llama-lm")
    model, tokenizer = language.model("llama-lm"), AutoTokenizer.from_pretrained(folder)
    for parameter in [*model.shared.parameters(), *model.router.parameters()]:
        parameter.requires_grad_(False)
    inputs = prompts(rows=8, side="right")
    rows = [
        {"input_ids": ids[mask > 0].tolist(), "labels": ids[mask > 0].tolist()}
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4,
        learning_rate=0.01, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, seed=0,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator,
                      processing_class=tokenizer)  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.predict(rows)
    assert math.isfinite(before) and after.metrics["test_loss"] < before
    assert len(after.predictions) == 8 and not isinstance(after.predictions, tuple)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    inputs = prompts()
    with torch.no_grad():
        torch.testing.assert_close(saved(**inputs).logits, model.eval()(**inputs).logits)
    assert saved.config.pad_token_id == tokenizer.pad_token_id
