"""Tiny language models: experts on disk, artifacts built from them once, and each expert's own stock model."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests import tiny
from twin_merging_hf import modeling
from twin_merging_hf.builder import Progress, build_artifact


NAMES = ["a", "b", "c", "d"]
CAUSAL = ("llama-lm", "mistral-lm", "qwen2-lm", "qwen3-lm", "gpt2-lm", "gpt_neox-lm")
SEQ2SEQ = ("t5-lm", "bart-lm")
MASKED = ("bert-lm", "roberta-lm")
TIED = [(kind, tied) for kind in (*CAUSAL, *SEQ2SEQ, *MASKED) for tied in (True, False) if kind != "bart-lm" or tied]
"""Every family with tied and untied embeddings; BART's are always tied."""
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}
"""No token twice: random models would write one and the same, and prove little."""


class LanguageWorld:
    """Experts and artifacts by family, each made once; tests must not change the files."""

    def __init__(self, root: Path):
        self.root = root
        self._built: dict[Path, Path] = {}

    def experts(self, kind: str, tied: bool = True) -> Path:
        """Folder of a base, four experts and rows for each."""
        folder = self.root / f"{kind}-{tied}"
        if not folder.exists():
            labels: dict = {name: () for name in NAMES}
            tiny.make_experts(kind, folder, labels, tie_word_embeddings=tied)
        return folder

    def artifact(self, kind: str, tied: bool = True, data: bool = False) -> Path:
        """Full-rank artifact; without data its router is `projection`, with data `lexical`."""
        folder = self.experts(kind, tied)
        name = f"artifact{'-data' if data else ''}"
        if folder / name not in self._built:
            options = {"router": "lexical"} if data else {}
            full = {"rank": tiny.FULL_RANK}
            recipe = tiny.write_recipe(folder, NAMES, data=data, file=f"{name}.yaml", exclusive=full, **options)
            self._built[folder / name] = build_artifact(recipe, folder / name, Progress(quiet=True)).folder
        return self._built[folder / name]

    def model(self, kind: str, tied: bool = True, data: bool = False) -> Any:
        """A fresh model of an artifact, in eval mode, by its own class."""
        folder = self.artifact(kind, tied, data)
        config = modeling.TwinMergingConfig.from_pretrained(folder)
        return getattr(modeling, config.architectures[0]).from_pretrained(folder).eval()

    def stock(self, kind: str, expert: str, tied: bool = True) -> Any:
        """An expert by its own class, as a user without this project would load it."""
        path = self.experts(kind, tied) / expert
        architecture = transformers.AutoConfig.from_pretrained(path).architectures[0]
        return getattr(transformers, architecture).from_pretrained(path).eval()


def prompts(rows: int = len(NAMES), tokens: int = 7, seed: int = 0, side: str = "left") -> dict[str, torch.Tensor]:
    """Random prompts [row, token], every second one two tokens shorter and padded on `side`."""
    ids = torch.randint(
        len(tiny.SPECIAL), tiny.VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.ones_like(ids)
    for row in range(1, rows, 2):
        place = slice(0, 2) if side == "left" else slice(tokens - 2, tokens)
        ids[row, place], mask[row, place] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def side_of(kind: str) -> str:
    """Where prompts of a family are padded: decoders go on from their end."""
    return "left" if kind in CAUSAL else "right"
