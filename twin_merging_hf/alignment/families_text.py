"""Permutation specs of BERT, RoBERTa, DistilBERT, GPT-2 and of Llama and its kin (Mistral, Qwen2, Qwen3)."""

from typing import Any

from .spec import Hook, Rule, Site, Spec, rule


NORMED = "a norm's statistics count every channel, so merging two changes all others"
_MULTIPLIED = "queries and keys are multiplied with each other, and nothing takes a merge of both back"


def attention_sites(width: int, heads: int, feed_forward: int) -> tuple[Site, ...]:
    """Residual stream, coupled heads, feed-forward units of a transformer without rotary positions and with LayerNorm."""
    dim = width // heads
    return (
        Site("res", width, why_not=NORMED),
        Site("h.{i}", heads),
        # Query and key are multiplied with each other, value and output follow one another: signs are free in both.
        Site("qk.{i}", dim, parent="h.{i}", signed=True, why_not=_MULTIPLIED),
        Site("vo.{i}", dim, parent="h.{i}", signed=True, zips=True),
        Site("ff.{i}", feed_forward, zips=True),
    )


def _encoder(prefix: str) -> tuple[Rule, ...]:
    embeddings, layer = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{i}}"
    return (
        rule(f"{embeddings}.{{word_embeddings,position_embeddings,token_type_embeddings}}.weight", None, "+res"),
        rule(f"{embeddings}.LayerNorm.weight", "*res"),
        rule(f"{layer}.attention.self.{{query,key}}.weight", "+h.{i}/qk.{i}", "-res"),
        rule(f"{layer}.attention.self.value.weight", "+h.{i}/vo.{i}", "-res"),
        rule(f"{layer}.attention.output.dense.weight", "+res", "-h.{i}/vo.{i}"),
        rule(f"{layer}.{{attention.output,output}}.LayerNorm.weight", "*res"),
        rule(f"{layer}.intermediate.dense.weight", "+ff.{i}", "-res"),
        rule(f"{layer}.output.dense.weight", "+res", "-ff.{i}"),
    )


def _encoder_hooks(prefix: str) -> tuple[Hook, ...]:
    layer = f"{prefix}.encoder.layer.{{i}}"
    return (
        Hook("in", f"{layer}.{{attention.self.query,intermediate.dense}}", "res"),
        Hook("out", f"{layer}.attention.self.{{query,key}}", "h.{i}/qk.{i}"),
        Hook("in", f"{layer}.attention.output.dense", "h.{i}/vo.{i}"),
        Hook("in", f"{layer}.output.dense", "ff.{i}"),
    )


def bert(config: Any, names: set[str]) -> Spec:
    """BERT with any head; the transform of a masked language model keeps the residual order where embeddings are tied."""
    pooled, transform = "bert.pooler.dense.weight" in names, _transform_site(config)
    head = "pool" if pooled else "res"
    return Spec(
        sites=(
            *attention_sites(config.hidden_size, config.num_attention_heads, config.intermediate_size),
            *([Site("pool", config.hidden_size, zips=True)] if pooled else []),
            *([Site("mlm", config.hidden_size, why_not=NORMED)] if transform == "mlm" else []),
        ),
        rules=(
            *_encoder("bert"),
            rule("bert.pooler.dense.weight", "+pool", "-res"),
            rule("{classifier,cls.seq_relationship,qa_outputs}.weight", None, f"-{head}", compared=False),
            rule("cls.predictions.transform.dense.weight", f"+{transform}", "-res"),
            rule("cls.predictions.transform.LayerNorm.weight", f"*{transform}"),
            rule("cls.predictions.decoder.weight", None, f"-{transform}"),
            rule("cls.predictions.bias", None),
        ),
        hooks=(*_encoder_hooks("bert"), Hook("in", "{classifier,cls.seq_relationship}", head)),
        layers=config.num_hidden_layers,
    )


def _transform_site(config: Any) -> str:
    return "res" if config.tie_word_embeddings else "mlm"


def roberta(config: Any, names: set[str]) -> Spec:
    """RoBERTa with any head; its classifier has a hidden layer of its own."""
    transform, hidden = _transform_site(config), "classifier.dense.weight" in names
    return Spec(
        sites=(
            *attention_sites(config.hidden_size, config.num_attention_heads, config.intermediate_size),
            *(
                [Site("pool", config.hidden_size, zips=True)]
                if {"classifier.dense.weight", _ROBERTA_POOL} & names
                else []
            ),
            *([Site("mlm", config.hidden_size, why_not=NORMED)] if transform == "mlm" else []),
        ),
        rules=(
            *_encoder("roberta"),
            rule(f"{{classifier.dense.weight,{_ROBERTA_POOL}}}", "+pool", "-res"),
            rule("classifier.out_proj.weight", None, "-pool", compared=False),
            rule("{classifier,qa_outputs}.weight", None, "-pool" if _ROBERTA_POOL in names else "-res", compared=False),
            rule("lm_head.dense.weight", f"+{transform}", "-res"),
            rule("lm_head.layer_norm.weight", f"*{transform}"),
            rule("lm_head.decoder.weight", None, f"-{transform}"),
            rule("lm_head.bias", None),
        ),
        hooks=(
            *_encoder_hooks("roberta"),
            Hook("in", "classifier.dense" if hidden else "classifier", "pool" if _ROBERTA_POOL in names else "res"),
            Hook("in", "classifier.out_proj", "pool"),
        ),
        layers=config.num_hidden_layers,
    )


_ROBERTA_POOL = "roberta.pooler.dense.weight"


def small_bert(config: Any) -> dict:
    """Fields of a small BERT, RoBERTa or ViT with the same settings."""
    return {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "vocab_size": 40,
        "max_position_embeddings": 40,
    }


def distilbert(config: Any, names: set[str]) -> Spec:
    """DistilBERT with any head."""
    layer, transform = "distilbert.transformer.layer.{i}", _transform_site(config)
    pooled = "pre_classifier.weight" in names
    head = "pool" if pooled else "res"
    return Spec(
        sites=(
            *attention_sites(config.dim, config.n_heads, config.hidden_dim),
            *([Site("pool", config.dim, zips=True)] if pooled else []),
            *([Site("mlm", config.dim, why_not=NORMED)] if transform == "mlm" else []),
        ),
        rules=(
            rule("distilbert.embeddings.{word_embeddings,position_embeddings}.weight", None, "+res"),
            rule("distilbert.embeddings.LayerNorm.weight", "*res"),
            rule(f"{layer}.attention.{{q_lin,k_lin}}.weight", "+h.{i}/qk.{i}", "-res"),
            rule(f"{layer}.attention.v_lin.weight", "+h.{i}/vo.{i}", "-res"),
            rule(f"{layer}.attention.out_lin.weight", "+res", "-h.{i}/vo.{i}"),
            rule(f"{layer}.{{sa_layer_norm,output_layer_norm}}.weight", "*res"),
            rule(f"{layer}.ffn.lin1.weight", "+ff.{i}", "-res"),
            rule(f"{layer}.ffn.lin2.weight", "+res", "-ff.{i}"),
            rule("pre_classifier.weight", "+pool", "-res"),
            rule("{classifier,qa_outputs}.weight", None, f"-{head}", compared=False),
            rule("vocab_transform.weight", f"+{transform}", "-res"),
            rule("vocab_layer_norm.weight", f"*{transform}"),
            rule("vocab_projector.weight", None, f"-{transform}"),
        ),
        hooks=(
            Hook("in", f"{layer}.{{attention.q_lin,ffn.lin1}}", "res"),
            Hook("out", f"{layer}.attention.{{q_lin,k_lin}}", "h.{i}/qk.{i}"),
            Hook("in", f"{layer}.attention.out_lin", "h.{i}/vo.{i}"),
            Hook("in", f"{layer}.ffn.lin2", "ff.{i}"),
            Hook("in", "pre_classifier", "res"),
            Hook("in", "classifier", head),
        ),
        layers=config.n_layers,
    )


def small_distilbert(config: Any) -> dict:
    """Fields of a small DistilBERT with the same settings."""
    sizes = {"n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 24}
    return {**sizes, "vocab_size": 40, "max_position_embeddings": 40}


def gpt2(config: Any, names: set[str]) -> Spec:
    """GPT-2 with any head; its Conv1D stores [in, out]."""
    layer, heads = "transformer.h.{i}", "h.{i}/qk.{i} | h.{i}/qk.{i} | h.{i}/vo.{i}"
    return Spec(
        sites=attention_sites(config.n_embd, config.n_head, config.n_inner or 4 * config.n_embd),
        rules=(
            rule("transformer.{wte,wpe}.weight", None, "+res"),
            rule(f"{layer}.{{ln_1,ln_2}}.weight", "*res"),
            rule("transformer.ln_f.weight", "*res"),
            rule(f"{layer}.attn.c_attn.weight", "-res", f"+{heads}"),
            rule(f"{layer}.attn.c_proj.weight", "-h.{i}/vo.{i}", "+res"),
            rule(f"{layer}.mlp.c_fc.weight", "-res", "+ff.{i}"),
            rule(f"{layer}.mlp.c_proj.weight", "-ff.{i}", "+res"),
            rule("lm_head.weight", None, "-res"),
            rule("{score,classifier,qa_outputs}.weight", None, "-res", compared=False),
        ),
        hooks=(
            Hook("in", f"{layer}.{{attn.c_attn,mlp.c_fc}}", "res"),
            Hook("in", "{lm_head,score,classifier}", "res"),
            Hook("out", f"{layer}.attn.c_attn", heads),
            Hook("in", f"{layer}.mlp.c_proj", "ff.{i}"),
        ),
        layers=config.n_layer,
    )


def small_gpt2(config: Any) -> dict:
    """Fields of a small GPT-2 with the same settings."""
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": config.n_inner and 24}
    return {**sizes, "vocab_size": 40, "n_positions": 40}


def llama(config: Any, names: set[str]) -> Spec:
    """
    Llama, Mistral, Qwen2, Qwen3 with any head.

    RMSNorm takes no mean, so a residual channel's sign is free; so is that of the gated unit, whose gate has no part in it.
    Rotary positions fix the dimensions of queries and keys; their heads still move, in groups that share keys and values.
    """
    layer, groups = "model.layers.{i}", config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Spec(
        sites=(
            Site("res", config.hidden_size, signed=True, why_not=NORMED),
            Site("kv.{i}", groups),
            Site("rep.{i}", config.num_attention_heads // groups, parent="kv.{i}"),
            Site("qk.{i}", dim, parent="kv.{i}", fixed=True),
            Site("vo.{i}", dim, parent="kv.{i}", signed=True, zips=True),
            Site("ff.{i}", config.intermediate_size, signed=True, zips=True),
        ),
        rules=(
            rule("model.embed_tokens.weight", None, "+res"),
            rule(f"{layer}.{{input_layernorm,post_attention_layernorm}}.weight", "*res"),
            rule("model.norm.weight", "*res"),
            rule(f"{layer}.self_attn.q_proj.weight", "+kv.{i}/rep.{i}/qk.{i}", "-res"),
            rule(f"{layer}.self_attn.k_proj.weight", "+kv.{i}/qk.{i}", "-res"),
            rule(f"{layer}.self_attn.{{q_norm,k_norm}}.weight", None),
            rule(f"{layer}.self_attn.v_proj.weight", "+kv.{i}/vo.{i}", "-res"),
            rule(f"{layer}.self_attn.o_proj.weight", "+res", "-kv.{i}/rep.{i}/vo.{i}"),
            rule(f"{layer}.mlp.gate_proj.weight", "*ff.{i}", "-res"),
            rule(f"{layer}.mlp.up_proj.weight", "+ff.{i}", "-res"),
            rule(f"{layer}.mlp.down_proj.weight", "+res", "-ff.{i}"),
            rule("lm_head.weight", None, "-res"),
            rule("{score,qa_outputs}.weight", None, "-res", compared=False),
        ),
        hooks=(
            Hook("in", f"{layer}.{{self_attn.q_proj,mlp.gate_proj}}", "res"),
            Hook("in", "{lm_head,score}", "res"),
            Hook("out", f"{layer}.self_attn.q_proj", "kv.{i}/rep.{i}/qk.{i}"),
            Hook("out", f"{layer}.self_attn.k_proj", "kv.{i}/qk.{i}"),
            Hook("in", f"{layer}.self_attn.o_proj", "kv.{i}/rep.{i}/vo.{i}"),
            Hook("in", f"{layer}.mlp.down_proj", "ff.{i}"),
        ),
        layers=config.num_hidden_layers,
    )


def small_llama(config: Any) -> dict:
    """Fields of a small model with the same ratio of heads to key-value heads (at most 4), and the same settings."""
    ratio = min(4, config.num_attention_heads // config.num_key_value_heads)
    groups = min(3, config.num_key_value_heads)
    sizes = {"num_hidden_layers": 2, "hidden_size": 8 * groups * ratio, "intermediate_size": 20, "head_dim": 8}
    heads = {"num_attention_heads": groups * ratio, "num_key_value_heads": groups}
    return {**sizes, **heads, "vocab_size": 40, "max_position_embeddings": 40, "layer_types": ["full_attention"] * 2}
