"""A random stock model, the factors of its experts, and every model that is made of them; all share the same memory."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from twin_merging_hf import modeling
from twin_merging_hf.modeling.configuration_twin_merging import TwinMergingConfig
from twin_merging_hf.modeling.deltas_twin_merging import delta_key, parameter_owners
from twin_merging_hf.modeling.factors_twin_merging import INTEGER_BITS, pack_nibbles


@dataclass(frozen=True)
class Shape:
    """A family of models and its sizes. layers_path: where the task model keeps its layers."""

    config_class: str
    stock_class: str
    wrapper_class: str
    layers_path: str
    head_modules: tuple
    problem_type: str
    sizes: dict

    @property
    def generates(self) -> bool:
        return "CausalLM" in self.stock_class

    def with_sizes(self, **sizes: Any) -> "Shape":
        return Shape(**{**self.__dict__, "sizes": {**self.sizes, **sizes}})

    def config(self) -> Any:
        return getattr(transformers, self.config_class)(**self.sizes)


BERT_BASE = Shape(
    "BertConfig", "BertForSequenceClassification", "TwinMergingModel", "bert.encoder.layer", ("classifier",),
    "single_label_classification", {},
)  # fmt: skip
_LLAMA = ("LlamaConfig", "LlamaForCausalLM", "TwinMergingForCausalLM", "model.layers", (), "language_modeling")
SMOL = Shape(
    *_LLAMA,
    {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
     "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 2048,
     "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
)  # fmt: skip
"""SmolLM2-135M."""
LLAMA_8B = SMOL.with_sizes(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
_DELTA_SIZE = 0.03  # of the factors' entries: a delta is then a fifth of its weight matrix


@dataclass(frozen=True)
class Factors:
    """
    All experts' deltas of one matrix: delta_t = up[:, t] @ down[t], in float; `scale` is inside `up`.

    integers: for integer storage, what is stored: (up, down, scale), unpacked.
    """

    up: torch.Tensor
    down: torch.Tensor
    integers: tuple | None = None


def twin(model: Any) -> Any:
    """A model of the same class on the same parameters and buffers, without a copy of them."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in a parameter's place, in every module that holds it."""
    owners, _ = parameter_owners(model)[name]
    parameter = nn.Parameter(value, requires_grad=False)
    for owner, attribute in owners:
        owner._parameters[attribute] = parameter


class World:
    """
    Args:
        ranks: rank of each expert, on every matrix of the layers.
        everything: deltas also on embeddings (factors) and on biases and norms (exact), as a build makes them.
        storage: of the factors: `float32` (then they have the model's `dtype`), `int8` or `int4`.
    """

    def __init__(self, shape: Shape, ranks: Sequence[int], *, dtype: torch.dtype = torch.float32,
                 storage: str = "float32", everything: bool = False, device: str = "cpu", seed: int = 0):  # fmt: skip
        self.shape, self.ranks, self.dtype, self.storage = shape, list(ranks), dtype, storage
        self.device = torch.device(device)
        torch.manual_seed(seed)
        with self.device:
            self.stock = getattr(transformers, shape.stock_class)._from_config(shape.config(), dtype=dtype).eval()
        for parameter in self.stock.parameters():
            parameter.requires_grad_(False)
        chosen = [(name, p) for name, p in self.stock.named_parameters() if self._has_delta(name, p, everything)]
        self.factors = {name: self._draw(p) for name, p in chosen if p.dim() == 2}
        self.vectors = {
            name: _DELTA_SIZE * torch.randn(len(ranks), *p.shape, dtype=dtype, device=self.device)
            for name, p in chosen
            if p.dim() == 1
        }

    def _has_delta(self, name: str, parameter: torch.Tensor, everything: bool) -> bool:
        in_layers = name.startswith(self.shape.layers_path)
        if everything:
            return not name.startswith(self.shape.head_modules) if self.shape.head_modules else True
        return in_layers and parameter.dim() == 2

    def _draw(self, parameter: torch.Tensor) -> Factors:
        m, n, total = *parameter.shape, sum(self.ranks)
        bits = INTEGER_BITS.get(self.storage)
        if bits is None:
            up, down = torch.randn(m, total, device=self.device), torch.randn(total, n, device=self.device)
            return Factors((_DELTA_SIZE * up).to(self.dtype), (_DELTA_SIZE * down).to(self.dtype))
        most = 2 ** (bits - 1) - 1
        up_q, down_q = torch.randint(-most, most + 1, (m, total)), torch.randint(-most, most + 1, (total, n))
        scale = 3 * _DELTA_SIZE**2 * (0.5 + torch.rand(total))
        unit = 2.0 ** (1 - bits)
        return Factors(up_q * unit * scale, down_q * unit, (up_q, down_q, scale))

    @property
    def count(self) -> int:
        return len(self.ranks)

    def body(self, task_model: Any) -> Any:
        """What is run: the whole language model, or an encoder without its head."""
        return task_model if self.shape.generates else task_model.base_model

    def body_name(self, name: str) -> str:
        """A parameter's name within `body`."""
        return name if self.shape.generates else name.removeprefix(f"{self.stock.base_model_prefix}.")

    def layer_of(self, name: str) -> int:
        """The layer that a parameter belongs to; -1: below all layers."""
        rest = name.removeprefix(f"{self.shape.layers_path}.")
        return -1 if rest == name else int(rest.split(".")[0])

    # ---- dense models -----------------------------------------------------------------------------------------

    def merged(self, weights: torch.Tensor, first_layer: int | None = None, dtype: torch.dtype | None = None) -> Any:
        """
        The stock model with `shared + sum_t weights[t] * delta_t` in it: dense, the reference of everything.

        Args:
            weights: [expert].
            first_layer: deltas below this layer are left out.
            dtype: of the whole model; the sums are float32.
        """
        model = twin(self.stock)
        weights = weights.to(device=self.device, dtype=torch.float32)
        start = dict(self.stock.named_parameters())
        columns = torch.repeat_interleave(weights, torch.tensor(self.ranks, device=self.device))
        sums = {n: (f.up.float() * columns) @ f.down.float() for n, f in self.factors.items()}
        sums |= {n: torch.tensordot(weights, v.float(), dims=1) for n, v in self.vectors.items()}
        for name, parameter in start.items():
            value = parameter
            if name in sums and (first_layer is None or self.layer_of(name) >= first_layer):
                value = parameter.float() + sums.pop(name)
            if value is not parameter or dtype not in (None, self.dtype):
                set_parameter(model, name, value.to(dtype or self.dtype))
        return model

    # ---- ours -------------------------------------------------------------------------------------------------

    def wrapper(self, router_pass: str = "full", layer: int | None = None, top_k: int | None = None) -> Any:
        """A Twin-Merging model of these parameters. layer: where its router reads; `late`: deltas only from there on."""
        kept = [n for n in (*self.factors, *self.vectors) if router_pass != "late" or self.layer_of(n) >= (layer or 0)]
        labels = [] if self.shape.generates else ["x", "y"]
        experts = [
            {"name": f"e{t}", "problem_type": self.shape.problem_type, "labels": labels} for t in range(self.count)
        ]
        config = TwinMergingConfig(
            shared_config=copy.deepcopy(self.stock.config),
            shared_class=self.shape.stock_class,
            head_modules=list(self.shape.head_modules),
            layers_path=self.shape.layers_path,
            experts=experts,
            ranks={name: self.ranks for name in kept if name in self.factors},
            exact_deltas=[name for name in kept if name in self.vectors],
            factor_dtype=self.storage,
            router_type="linear",
            router_pass=router_pass,
            router_layer=layer,
            router_input_size=self.stock.config.hidden_size,
            router_top_k=top_k,
        )
        with torch.device("meta"):
            model = getattr(modeling, self.shape.wrapper_class)(config)
        self._share(model)
        self._fill(model, kept)
        return model.eval()

    def _share(self, model: Any) -> None:
        """Put the stock model's parameters and buffers into a wrapper that was made without memory."""
        for path, module in self.stock.named_modules():
            if path.startswith(self.shape.head_modules) and self.shape.head_modules:
                continue
            target = model.shared.get_submodule(path)
            target._parameters.update(module._parameters)
            target._buffers.update(module._buffers)
            target.__dict__.update({k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)})
        for module in model.modules():
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    if tensor is not None and tensor.is_meta:
                        made = torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
                        kind[name] = nn.Parameter(made, requires_grad=False) if kind is module._parameters else made

    def _fill(self, model: Any, names: list[str]) -> None:
        for name in names:
            delta = model.deltas[delta_key(name)]
            if name in self.vectors:
                delta.delta = nn.Parameter(self.vectors[name], requires_grad=False)
                continue
            factors = self.factors[name]
            if factors.integers is None:
                delta.up = nn.Parameter(factors.up, requires_grad=False)
                delta.down = nn.Parameter(factors.down, requires_grad=False)
            else:
                up, down, scale = factors.integers
                four = self.storage == "int4"
                delta.up = pack_nibbles(up, 0) if four else up.to(torch.int8)
                delta.down = pack_nibbles(down, 1) if four else down.to(torch.int8)
                delta.scale = scale


def fit_router(model: Any, inputs: dict, sharpness: float = 1.0) -> None:
    """
    Give a linear router random directions that tell the rows of a batch apart (logits of this standard deviation).

    Rows of random tokens look alike to a random router, which would send them all to one expert.
    """
    with torch.no_grad():
        linear = model.router.classifier
        features = model.routing_features(**inputs).float()
        centred = features - features.mean(0)
        directions = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0)).to(features.device)
        size = (centred @ directions.T).std().clamp(min=1e-12)
        directions = directions * (sharpness / size)
        linear.weight.copy_(directions)
        linear.bias.copy_(-(directions @ features.mean(0)))


# ---- expert weights ----------------------------------------------------------------------------------------------


def dense_weights(rows: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Every expert in every row: [row, expert], softmax of random logits."""
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)).softmax(1)


def one_hot(rows: int, experts: int, seed: int = 0) -> torch.Tensor:
    """One expert a row, as many different ones as there can be: [row, expert]."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    return torch.eye(experts)[order[torch.arange(rows) % experts]]


def few_rows(rows: int, experts: int, groups: int, seed: int = 0) -> torch.Tensor:
    """`groups` different rows of dense weights, evenly spread: [row, expert]."""
    return dense_weights(groups, experts, seed)[torch.arange(rows) % groups]
