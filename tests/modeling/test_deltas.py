"""Each rule alone: a module with hooked deltas computes, row by row, what it computes with densely merged weights."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import BitConfig, Dinov2Config
from transformers.models.bit.modeling_bit import BitGroupNormActivation, WeightStandardizedConv2d
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.vit.modeling_vit import ViTEmbeddings
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tests.modeling.dense import assert_close, columns, dense_logits, row
from twin_merging_hf.modeling.call_twin_merging import CallWeights
from twin_merging_hf.modeling.deltas_twin_merging import attach_deltas, rows_like
from twin_merging_hf.modeling.factors_twin_merging import pack_nibbles, unpack_nibbles
from twin_merging_hf.modeling.mix_twin_merging import ExpertMix


WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.3, 0.4], [0.0, 0.0, 1.0]])
BATCH = len(WEIGHTS)
RANKS = [2, 0, 3]  # ranks may differ between experts, and be zero


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def is_vector(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 1 or parameter.shape[:2] == (1, 1)


STORAGES = ("float32", "int8", "int4", "sparse")
ENTRIES = [4, 0, 3]


def fill(delta: nn.Module, size: int, seed: int) -> None:
    """Random content: numbers, integers (the unused half of a last byte too), ascending places."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in delta.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    for name, buffer in delta.named_buffers():
        if name == "scale":
            buffer.copy_(torch.rand(buffer.shape, generator=rng) + 0.5)
        elif name == "indices":
            buffer.copy_(torch.cat([torch.randperm(size, generator=rng)[:k].sort().values for k in ENTRIES]))
        elif buffer.dtype == torch.int8:
            buffer.copy_(torch.randint(-127, 128, buffer.shape, generator=rng))
        else:
            buffer.copy_(torch.randint(0, 256, buffer.shape, generator=rng))


def dense_deltas(delta: Any, shape: torch.Size, storage: str) -> list[torch.Tensor]:
    """What each expert's delta is by the definition of the storage, number by number."""
    if storage == "sparse":
        values, places = delta.values.tolist(), delta.indices.tolist()
        result = []
        for start, stop in ((0, 4), (4, 4), (4, 7)):
            flat = torch.zeros(shape.numel())
            for value, place in zip(values[start:stop], places[start:stop], strict=True):
                flat[place] = value
            result.append(flat.reshape(shape))
        return result
    m, n = shape[-2:] if len(shape) == 3 else (shape[0], shape[1:].numel())
    up, down = delta.up, delta.down
    if storage == "int4":
        up = torch.tensor([[by_half(up[i // 2, j], i % 2) for j in range(up.shape[1])] for i in range(m)])
        down = torch.tensor([[by_half(down[i, j // 2], j % 2) for j in range(n)] for i in range(len(down))])
    if storage != "float32":
        unit = {"int8": 128, "int4": 8}[storage]
        up, down = up.float() / unit * delta.scale, down.float() / unit
    ups, downs = up.split(RANKS, dim=1), down.split(RANKS, dim=0)
    return [(up @ down).reshape(shape) for up, down in zip(ups, downs, strict=True)]


def by_half(byte: torch.Tensor, high: int) -> int:
    return (int(byte) >> 4 if high else int(byte) & 15) - 8


class Hooked:
    """A module with random deltas on some of its parameters, and the dense weights they stand for."""

    def __init__(self, module: nn.Module, names: list[str] | None = None, storage: str = "float32"):
        self.module, self.mix = module.eval(), ExpertMix()
        with torch.no_grad():
            for i, parameter in enumerate(module.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=i))
        self.own = {name: value.detach().clone() for name, value in module.named_parameters()}
        names = list(self.own) if names is None else names
        matrices = [name for name in names if not is_vector(self.own[name])]
        exact = [name for name in names if is_vector(self.own[name])]
        ranks, sparse = dict.fromkeys(matrices, RANKS), dict.fromkeys(matrices, ENTRIES)
        self.deltas = (
            attach_deltas(module, self.mix, {}, exact, len(RANKS), sparse=sparse)
            if storage == "sparse"
            else attach_deltas(module, self.mix, ranks, exact, len(RANKS), storage)
        )
        self.dense: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for i, name in enumerate(names):
                delta, shape = self.deltas[name.replace(".", "-")], self.own[name].shape
                fill(delta, shape.numel(), 100 + i)
                self.dense[name] = list(delta.delta) if name in exact else dense_deltas(delta, shape, storage)

    def mixed(self, *args: Any, weights: torch.Tensor = WEIGHTS, **kwargs: Any) -> torch.Tensor:
        """One call for all rows."""
        with torch.no_grad(), self.mix.applied(CallWeights(weights)):
            return self.module(*args, **kwargs)

    def alone(self, weights: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same module with dense weights, experts off."""
        state = dict(self.own)
        for name, deltas in self.dense.items():
            state[name] = state[name] + sum(w * d for w, d in zip(weights, deltas, strict=True))
        with torch.no_grad(), self.mix.applied(None):
            return functional_call(self.module, state, args, kwargs)


def assert_rows_are_dense(hooked: Hooked, x: torch.Tensor, **kwargs: Any) -> None:
    """Every row of a mixed call equals the dense call of that row, and the deltas do act."""
    output = hooked.mixed(x, **kwargs)
    per_row = len(x) // BATCH
    for b, weights in enumerate(WEIGHTS):
        rows = slice(b * per_row, (b + 1) * per_row)
        expected = hooked.alone(weights, x[rows], **kwargs)
        assert_close(output[rows], expected, 1e-4)
    plain = hooked.alone(torch.zeros(3), x, **kwargs)
    assert (output - plain).abs().max() > 0.1
    with torch.no_grad():
        assert torch.equal(hooked.module(x, **kwargs), plain)  # outside a call the experts are off


def batch_norm(**settings: Any) -> nn.BatchNorm2d:
    """With statistics of its own, as after training."""
    norm = nn.BatchNorm2d(4, **settings)
    norm.running_mean.copy_(draw(4, seed=1))
    norm.running_var.copy_(draw(4, seed=2).exp())
    return norm


def standardised(kernel: int, padding: Any, **settings: Any) -> nn.Module:
    return WeightStandardizedConv2d(3, 5, kernel, padding=padding, eps=1e-3, **settings)


FLOAT_INPUTS: dict[str, tuple[Any, tuple]] = {
    "linear": (lambda: nn.Linear(6, 5), (5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (5, 6)),
    "linear on one vector for each row": (lambda: nn.Linear(6, 5), (6,)),
    "linear on heads": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "conv1d": (lambda: Conv1D(5, 6), (4, 6)),
    "layer norm": (lambda: nn.LayerNorm(6), (5, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (5, 6)),
    "layer norm of another eps": (lambda: nn.LayerNorm(6, eps=0.5), (5, 6)),
    "llama's rms norm": (lambda: LlamaRMSNorm(6, eps=0.3), (5, 6)),
    "torch's rms norm": (lambda: nn.RMSNorm(6, eps=0.3), (5, 6)),
    "torch's rms norm of the default eps": (lambda: nn.RMSNorm(6), (5, 6)),
    "conv2d on patches": (lambda: nn.Conv2d(3, 5, kernel_size=4, stride=4), (3, 8, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=2, dilation=2), (3, 9, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 5, (1, 3), padding="same", bias=False), (3, 5, 5)),
    "batch norm": (lambda: batch_norm(eps=0.1), (4, 5, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=0.1), (4, 5, 3)),
    "group norm of rows of numbers": (lambda: nn.GroupNorm(2, 4), (4,)),
    "bit's group norm": (lambda: BitGroupNormActivation(BitConfig(num_groups=2), 4), (4, 5, 3)),
    "bit's group norm alone": (
        lambda: BitGroupNormActivation(BitConfig(num_groups=2), 4, apply_activation=False),
        (4, 5, 3),
    ),
    "standardised convolution": (lambda: standardised(3, None), (3, 5, 6)),
    "standardised convolution that pads": (lambda: standardised(3, "same", stride=2, bias=True), (3, 6, 7)),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("new", "shape"), FLOAT_INPUTS.values(), ids=FLOAT_INPUTS)
def test_the_rule_equals_dense_weights_row_by_row(new, shape, storage):
    torch.manual_seed(0)
    assert_rows_are_dense(Hooked(new(), storage=storage), draw(BATCH, *shape, seed=7))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("new", [lambda: nn.Linear(6, 5), lambda: nn.LayerNorm(6)], ids=["linear", "layer norm"])
def test_a_parameter_may_have_a_delta_alone(new, name):
    assert_rows_are_dense(Hooked(new(), [name]), draw(BATCH, 5, 6, seed=7))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("new", [batch_norm, lambda: nn.GroupNorm(2, 4)], ids=["batch norm", "group norm"])
def test_a_channel_norm_may_have_a_delta_of_its_scale_or_its_shift_alone(new, name):
    assert_rows_are_dense(Hooked(new(), [name]), draw(BATCH, 4, 5, 3, seed=7))


def test_a_layer_norm_whose_scale_is_zero_still_gets_its_delta():
    hooked = Hooked(nn.LayerNorm(6))
    with torch.no_grad():
        hooked.module.weight.zero_()
    hooked.own["weight"] = torch.zeros(6)
    assert_rows_are_dense(hooked, draw(BATCH, 5, 6))


@pytest.mark.parametrize("storage", STORAGES)
def test_embedding_equals_dense_tables_row_by_row(storage):
    ids = torch.arange(BATCH * 5).reshape(BATCH, 5) % 9
    assert_rows_are_dense(Hooked(nn.Embedding(9, 6), storage=storage), ids)


@pytest.mark.parametrize("storage", STORAGES)
def test_embedding_of_positions_shared_by_all_rows_gives_each_row_its_own(storage):
    hooked = Hooked(nn.Embedding(9, 6), storage=storage)
    positions = torch.tensor([3, 1, 4, 1])
    for ids in (positions, positions[None]):
        output = hooked.mixed(ids)
        assert output.shape == (BATCH, 4, 6)
        for b, weights in enumerate(WEIGHTS):
            assert_close(output[b], hooked.alone(weights, positions), 1e-4)


def test_embedding_with_a_padding_index_looks_up_that_row_s_delta_too():
    assert_rows_are_dense(Hooked(nn.Embedding(9, 6, padding_idx=0)), torch.tensor([[0, 1, 2]] * BATCH))


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("new", [lambda: nn.Linear(6, 5), lambda: nn.LayerNorm(6), lambda: Conv1D(5, 6)])
def test_rows_that_a_module_folds_into_the_batch_keep_their_weights(new, storage):
    # Patches or windows of one row follow each other: [batch * k, d].
    assert_rows_are_dense(Hooked(new(), storage=storage), draw(BATCH * 3, 6, seed=7))


@pytest.mark.parametrize("storage", STORAGES)
def test_one_row_broadcasts_to_every_row_of_the_batch(storage):
    hooked, x = Hooked(nn.Linear(6, 5), storage=storage), draw(1, 4, 6, seed=7)
    output = hooked.mixed(x)
    assert output.shape == (BATCH, 4, 5)
    for b, weights in enumerate(WEIGHTS):
        assert_close(output[b : b + 1], hooked.alone(weights, x), 1e-4)


def test_rows_that_cannot_be_matched_raise():
    for new in (lambda: nn.Linear(6, 5), lambda: nn.LayerNorm(6)):
        with pytest.raises(ValueError, match="6 rows where the batch has 4"):
            Hooked(new()).mixed(draw(BATCH + 2, 5, 6))


def test_rows_like_shapes_values_for_every_kind_of_input():
    values = draw(4, 3)
    assert torch.equal(rows_like(values, torch.zeros(4, 7, 3)), values[:, None, :])
    assert torch.equal(rows_like(values, torch.zeros(4, 2, 7, 3)), values[:, None, None, :])
    assert torch.equal(rows_like(values, torch.zeros(1, 7, 3)), values[:, None, :])
    assert torch.equal(rows_like(values, torch.zeros(8, 3)), values.repeat_interleave(2, dim=0))
    assert torch.equal(rows_like(values, torch.zeros(4, 3, 5, 5), feature_dims=3), values)
    one = values[:1]  # for all rows
    assert torch.equal(rows_like(one, torch.zeros(6, 3)), one)
    with pytest.raises(ValueError, match="5 rows where the batch has 4"):
        rows_like(values, torch.zeros(5, 3))


def test_an_input_given_by_keyword_is_found():
    hooked, x = Hooked(nn.Linear(6, 5)), draw(BATCH, 6)
    assert torch.equal(hooked.mixed(input=x), hooked.mixed(x))


# ---- bare parameters ------------------------------------------------------------------------------------------------


def vit_embeddings() -> nn.Module:
    return ViTEmbeddings(tiny.new_config("vit", hidden_dropout_prob=0.0))


@pytest.mark.parametrize("storage", STORAGES)
def test_class_token_and_position_table_equal_dense_ones_row_by_row(storage):
    hooked = Hooked(vit_embeddings(), storage=storage)
    assert {"cls_token", "position_embeddings"} <= set(hooked.dense)
    assert_rows_are_dense(hooked, draw(BATCH, 3, tiny.IMAGE, tiny.IMAGE))


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (8, 20)], ids=str)
def test_an_interpolated_position_table_equals_the_dense_one_row_by_row(size):
    assert_rows_are_dense(Hooked(vit_embeddings()), draw(BATCH, 3, *size), interpolate_pos_encoding=True)


@pytest.mark.parametrize("size", [(16, 16), (24, 24)], ids=str)
def test_a_table_that_its_module_interpolates_unasked_equals_the_dense_one_row_by_row(size):
    config = Dinov2Config(hidden_size=8, num_attention_heads=1, image_size=16, patch_size=4, hidden_dropout_prob=0.0)
    module = Dinov2Embeddings(config)
    names = [name for name, _ in module.named_parameters() if name != "mask_token"]
    assert_rows_are_dense(Hooked(module, names), draw(BATCH, 3, *size))


def test_one_row_of_weights_holds_for_every_picture():
    hooked, x = Hooked(vit_embeddings()), draw(BATCH, 3, 24, 24)
    for options in ({}, {"interpolate_pos_encoding": True}):
        pixels = x[..., :16, :16] if not options else x
        expected = hooked.alone(WEIGHTS[2], pixels, **options)
        assert_close(hooked.mixed(pixels, weights=WEIGHTS[2:3].expand(BATCH, -1), **options), expected, 1e-4)


@torch.no_grad()
def test_pictures_of_another_size_equal_their_dense_models(world, models):
    model, inputs = models("vit"), tiny.image_batch(BATCH, size=24)
    output = model(**inputs, expert_weights=WEIGHTS, interpolate_pos_encoding=True)
    for i, weights in enumerate(WEIGHTS):
        single = {**row(inputs, i), "interpolate_pos_encoding": True}
        expected = dense_logits(model, "vit", world.experts("vit"), weights, "b", single)
        assert_close(output.expert_logits[i : i + 1, columns(model, "b")], expected)


@torch.no_grad()
def test_pictures_of_another_size_are_routed_alone_as_in_a_batch(models):
    model, inputs = models("vit"), tiny.image_batch(3, size=24)
    together = model(**inputs, interpolate_pos_encoding=True)
    for i in range(3):
        alone = model(pixel_values=inputs["pixel_values"][i : i + 1], interpolate_pos_encoding=True)
        assert_close(alone.expert_weights, together.expert_weights[i : i + 1])
        assert_close(alone.expert_logits, together.expert_logits[i : i + 1])


# ---- what has no rule -----------------------------------------------------------------------------------------------


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ShiftedEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


class Bare(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(*shape))


NO_RULE: dict[str, tuple[Any, str]] = {
    "a subclass of Linear": (lambda: ScaledLinear(6, 5), "weight"),
    "a subclass of Embedding": (lambda: ShiftedEmbedding(9, 6), "weight"),
    "an embedding that rescales": (lambda: nn.Embedding(9, 6, max_norm=1.0), "weight"),
    "a grouped convolution": (lambda: nn.Conv2d(4, 4, 3, groups=2), "weight"),
    "a convolution that reflects": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), "weight"),
    "a batch norm without statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), "weight"),
    "a grouped standardised convolution": (
        lambda: WeightStandardizedConv2d(4, 4, 3, padding=None, groups=2),
        "weight",
    ),
    "a batch norm of rows": (lambda: nn.BatchNorm1d(6), "weight"),
    "a batch norm's bias": (lambda: nn.BatchNorm1d(6), "bias"),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(3, 5, 3), "weight"),
    "a bilinear layer": (lambda: nn.Bilinear(3, 4, 5), "weight"),
    "a bare vector": (lambda: Bare(6), "scale"),
    "a bare matrix": (lambda: Bare(5, 6), "scale"),
}


@pytest.mark.parametrize(("new", "name"), NO_RULE.values(), ids=NO_RULE)
def test_an_owner_without_a_rule_raises_and_is_named(new, name):
    owner = new()
    is_exact = dict(owner.named_parameters())[name].dim() == 1
    ranks, exact = ({}, [name]) if is_exact else ({name: RANKS}, [])
    with pytest.raises(ValueError, match=f"'{name}'.*{type(owner).__name__}"):
        attach_deltas(owner, ExpertMix(), ranks, exact, 3)


def test_a_delta_of_a_parameter_that_is_not_there_raises_and_names_it():
    with pytest.raises(ValueError, match="'wieght'"):
        attach_deltas(nn.Linear(6, 5), ExpertMix(), {"wieght": RANKS}, [], 3)


def test_tied_parameters_with_one_rule_share_one_delta():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    hooked = Hooked(Twice())
    assert list(hooked.deltas) == ["one-weight"]
    assert_rows_are_dense(hooked, draw(BATCH, 5, 6, seed=7))


# ---- integers and sparse entries --------------------------------------------------------------------------------------


def test_nibbles_have_known_bytes():
    values = torch.tensor([[-7, 7, 0], [1, -8, 3]], dtype=torch.int8)
    # Low half first, each plus 8; an odd length ends in a zero.
    assert pack_nibbles(values, 1).tolist() == [[1 + 15 * 16, 8 + 8 * 16], [9 + 0 * 16, 11 + 8 * 16]]
    assert pack_nibbles(values, 0).tolist() == [[1 + 9 * 16, 15 + 0 * 16, 8 + 11 * 16]]
    assert pack_nibbles(values, 1).dtype == torch.uint8


@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (5, 4), (7, 3)])
@pytest.mark.parametrize("dim", [0, 1])
def test_unpacking_undoes_packing(shape, dim):
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(values, dim), dim, shape[dim]), values)


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_integers_follow_the_input_s_type_and_stay_integers(storage, dtype):
    hooked, x = Hooked(nn.Linear(6, 5), storage=storage), draw(BATCH, 6, seed=7)
    expected = hooked.mixed(x)
    before = {name: buffer.clone() for name, buffer in hooked.deltas.named_buffers()}
    hooked.module.to(dtype)
    hooked.deltas.to(dtype)
    output = hooked.mixed(x.to(dtype))
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.03 * expected.abs().max()
    for name, buffer in hooked.deltas.named_buffers():
        assert buffer.dtype == dtype if name.endswith("scale") else torch.equal(buffer, before[name])


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_half_precision_neither_overflows_nor_vanishes(storage):
    """Deltas of usual size on activations of unusual size: plain integers would exceed 65504."""
    hooked = Hooked(nn.Linear(512, 512, bias=False), storage=storage)
    delta = hooked.deltas["weight"]
    delta.scale.fill_(1e-4)
    hooked.deltas.half()
    x = 50 * draw(BATCH, 512).abs()
    with torch.no_grad():
        hooked.module.weight.zero_()
        hooked.module.half()
    dense = torch.stack(dense_deltas(delta, torch.Size((512, 512)), storage))
    expected = torch.einsum("bt,tmn,bn->bm", WEIGHTS, dense, x)
    output = hooked.mixed(x.half()).float()
    assert torch.isfinite(output).all()
    assert (output - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_compiles(storage):
    hooked, x = Hooked(nn.Linear(6, 5), storage=storage), draw(BATCH, 3, 6)
    expected = hooked.mixed(x)

    def call(x):
        with hooked.mix.applied(CallWeights(WEIGHTS)):
            return hooked.module(x)

    with torch.no_grad():
        assert_close(torch.compile(call, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_pass_through_every_storage_and_reach_what_is_float(storage):
    hooked, x = Hooked(nn.Linear(6, 5), storage=storage), draw(BATCH, 6).requires_grad_()
    with hooked.mix.applied(CallWeights(WEIGHTS)):
        hooked.module(x).pow(2).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    trained = {name for name, p in hooked.deltas["weight"].named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"float32": {"up", "down"}, "sparse": {"values"}}.get(storage, set())


def test_a_vector_s_rule_cannot_be_sparse():
    with pytest.raises(ValueError, match="'layer_norm'.*sparse"):
        attach_deltas(nn.LayerNorm(6), ExpertMix(), {}, [], 3, sparse={"weight": ENTRIES})
