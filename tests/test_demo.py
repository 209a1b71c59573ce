"""The demo tells its whole story, here with training cut to one epoch; that experts become good is `make demo`'s to show."""

import json

from transformers import AutoModelForImageClassification

from twin_merging_hf.demo import experts, story


def test_the_story_from_training_to_the_scores(tmp_path, monkeypatch):
    for name in ("PRETRAINING", "FINE_TUNING"):
        monkeypatch.setattr(experts, name, experts.Schedule(epochs=1, learning_rate=1e-3))
    said = []
    story.tell(tmp_path / "demo", 0, said.append)
    scores = json.loads((tmp_path / "demo" / "scores.json").read_text(encoding="utf-8"))
    by_method = {line["method"]: line for line in scores["scores"]}
    names = scores["experts"]
    assert len(names) == 4 and by_method["each task's own expert"]["normalised"] == 1
    for line in by_method.values():
        assert all(0 <= line[name] <= 1 for name in names)
    # The confusion counts every test row once, in the row of its own task.
    for name, row in zip(names, scores["confusion"], strict=True):
        rows = (tmp_path / "demo" / "data" / name / "test.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(row) == 4 and sum(row) == len(rows) > 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "demo" / "artifact")
    assert model.expert_names == names
    assert all((tmp_path / "demo" / picture).stat().st_size > 5000 for picture in ("scores.png", "confusion.png"))
    assert "The whole demo took" in said[-1]
