"""Recipes: every knob, and a clear message for everything that is not one."""

import re
from pathlib import Path

import pytest
import yaml

from twin_merging_hf import TwinMergingError
from twin_merging_hf.recipe import Exclusive, ExpertSpec, Recipe, check_base, load_recipe, parse_recipe


MINIMAL = {"experts": [{"name": "a", "model": "folder/a"}]}


def two(**more) -> dict:
    experts = [{"name": name, "model": name, "data": f"{name}.jsonl"} for name in ("a", "b")]
    return {"base_model": "base", "experts": experts, **more}


def one(**expert) -> dict:
    return {"experts": [{"name": "a", "model": "m", **expert}]}


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_defaults_are_the_papers():
    recipe = parse_recipe(MINIMAL)
    assert recipe == Recipe(experts=(ExpertSpec("a", "folder/a"),))
    assert (recipe.merge_method, recipe.scaling, recipe.density, recipe.normalize) == ("linear", None, None, None)
    assert recipe.exclusive == Exclusive("svd", 16, None, "float32")
    assert recipe.router.type == "auto" and recipe.router.rows == 2000


def test_every_key_arrives(tmp_path):
    text = yaml.safe_dump(
        {
            "base_model": "base",
            "merge_method": "task_arithmetic",
            "parameters": {"lambda": 0.5, "normalize": False},
            "experts": [
                {
                    "name": "a",
                    "model": "org/model@v1",
                    "data": {"train": "t.jsonl", "validation": "v.jsonl", "test": "x.jsonl"},
                    "labels": ["no", "yes"],
                    "parameters": {"weight": 2},
                },
                {"model": "some/where/b", "data": "b.jsonl"},
            ],
            "exclusive": {"method": "svd", "ratio": 0.25, "dtype": "bf16"},
            "router": {
                "type": "mlp",
                "layer": 1,
                "pass": "prefix",
                "temperature": 2.0,
                "top_k": 1,
                "epochs": 3,
                "lr": 0.01,
                "rank": 4,
                "rows": 50,
            },
            "include": "a.*",
            "exclude": ["b.*", "c"],
            "dtype": "float64",
            "out_dtype": "bfloat16",
            "seed": 7,
            "trust_remote_code": True,
            "alignment": "none",
        },
        sort_keys=False,
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.text == text and recipe.folder == tmp_path and recipe.names == ["a", "b"]
    a, b = recipe.experts
    assert (a.labels, a.weight, a.model) == (("no", "yes"), 2.0, "org/model@v1")
    assert a.data is not None and b.data is not None
    assert (a.data.train, a.data.validation) == (tmp_path / "t.jsonl", tmp_path / "v.jsonl")
    assert (b.data.train, b.data.validation, b.data.test) == (tmp_path / "b.jsonl", None, None)
    assert recipe.exclusive == Exclusive("svd", None, 0.25, "bfloat16")
    router = recipe.router
    assert (router.type, router.layers, router.router_pass, router.temperature) == ("mlp", (1,), "prefix", 2.0)
    assert (router.top_k, router.epochs, router.lr, router.rank, router.rows) == (1, 3, 0.01, 4, 50)
    assert (recipe.include, recipe.exclude) == (("a.*",), ("b.*", "c"))
    assert (recipe.dtype, recipe.out_dtype, recipe.seed, recipe.trust_remote_code) == ("float64", "bfloat16", 7, True)
    assert (recipe.merge_method, recipe.scaling, recipe.normalize) == ("task_arithmetic", 0.5, False)


def test_a_router_may_be_given_by_its_type_alone():
    assert parse_recipe({**MINIMAL, "router": "projection"}).router.type == "projection"


# content, what the message must hold
BAD = {
    "no experts": ({}, ["experts", "missing"]),
    "experts empty": ({"experts": []}, ["experts", "at least one"]),
    "experts a mapping": ({"experts": {"a": 1}}, ["experts", "list"]),
    "expert a string": ({"experts": ["a"]}, ["experts[0]", "mapping", "model"]),
    "expert without model": ({"experts": [{"name": "a"}]}, ["experts[0]", "model", "Hub id"]),
    "empty model": (one(model=""), ["experts[0]", "model"]),
    "numeric model": (one(model=3), ["experts[0]", "model", "3"]),
    "unknown key": ({**MINIMAL, "expert": 1}, ["'expert'", "did you mean 'experts'", "known"]),
    "unknown key far off": ({**MINIMAL, "zzz": 1}, ["'zzz'", "known", "merge_method"]),
    "unknown expert key": (one(weight=1), ["experts[0]", "'weight'", "known", "parameters"]),
    "unknown data key": (one(data={"train": "x", "dev": "y"}), ["data", "'dev'", "validation"]),
    "unknown expert parameter": (one(parameters={"wait": 1}), ["parameters", "'wait'", "'weight'"]),
    "unknown parameter": ({**MINIMAL, "parameters": {"lamda": 1}}, ["parameters", "'lamda'", "'lambda'"]),
    "unknown exclusive key": ({**MINIMAL, "exclusive": {"ranks": 1}}, ["exclusive", "'ranks'", "'rank'"]),
    "unknown router key": ({**MINIMAL, "router": {"epoch": 1}}, ["router", "'epoch'", "'epochs'"]),
    "recipe a list": ([1], ["recipe", "mapping"]),
    "recipe empty": (None, ["recipe", "mapping"]),
    "base not text": ({**MINIMAL, "base_model": 5}, ["base_model", "5"]),
    "base empty": ({**MINIMAL, "base_model": ""}, ["base_model"]),
    "shared not text": ({**MINIMAL, "shared_model": ["x"]}, ["shared_model"]),
    "merge method": (
        {**MINIMAL, "merge_method": "slerp"},
        ["merge_method", "linear, task_arithmetic, ties, dare_linear, dare_ties, tsv_m", "'slerp'"],
    ),
    "density of the mean": ({**MINIMAL, "parameters": {"density": 0.5}}, ["density", "linear", "ties, dare_linear"]),
    "lambda of the mean": ({**MINIMAL, "parameters": {"lambda": 0.5}}, ["lambda", "linear", "task_arithmetic, ties"]),
    "density zero": (two(merge_method="ties", parameters={"density": 0}), ["density", "above 0 and at most 1"]),
    "density above one": (two(merge_method="ties", parameters={"density": 1.2}), ["density", "at most 1", "1.2"]),
    "density true": (two(merge_method="ties", parameters={"density": True}), ["density", "number"]),
    "normalize of tsv": (two(merge_method="tsv_m", parameters={"normalize": True}), ["normalize", "tsv_m"]),
    "merge method null": ({**MINIMAL, "merge_method": None}, ["merge_method", "linear"]),
    "both shared and merge": (
        {**MINIMAL, "base_model": "b", "shared_model": "base", "merge_method": "linear"},
        ["shared_model", "merge_method", "not both"],
    ),
    "lambda text": ({**MINIMAL, "parameters": {"lambda": "big"}}, ["lambda", "number", "'big'"]),
    "lambda nan": ({**MINIMAL, "parameters": {"lambda": float("nan")}}, ["lambda", "number"]),
    "lambda infinite": ({**MINIMAL, "parameters": {"lambda": float("inf")}}, ["lambda", "number"]),
    "lambda huge integer": ({**MINIMAL, "parameters": {"lambda": 10**400}}, ["lambda", "number"]),
    "lambda true": ({**MINIMAL, "parameters": {"lambda": True}}, ["lambda", "number"]),
    "normalize": ({**MINIMAL, "parameters": {"normalize": 1}}, ["normalize", "true or false"]),
    "parameters a list": ({**MINIMAL, "parameters": ["lambda"]}, ["parameters", "mapping"]),
    "parameters an empty list": ({**MINIMAL, "parameters": []}, ["parameters", "mapping"]),
    "parameters false": ({**MINIMAL, "parameters": False}, ["parameters", "mapping"]),
    "expert parameters an empty list": (one(parameters=[]), ["parameters", "mapping"]),
    "weight": (one(parameters={"weight": "1"}), ["weight", "number"]),
    "weights sum to zero": (
        {
            "experts": [
                {"name": "a", "model": "a", "parameters": {"weight": 1}},
                {"name": "b", "model": "b", "parameters": {"weight": -1}},
            ]
        },
        ["weight", "sum to 0"],
    ),
    "exclusive text": ({**MINIMAL, "exclusive": "svd"}, ["exclusive", "mapping", "rank"]),
    "exclusive zero": ({**MINIMAL, "exclusive": 0}, ["exclusive", "mapping"]),
    "method": ({**MINIMAL, "exclusive": {"method": "topk"}}, ["method", "svd, magnitude, bernoulli", "'topk'"]),
    "magnitude without ratio": ({**MINIMAL, "exclusive": {"method": "magnitude"}}, ["magnitude", "needs `ratio`"]),
    "bernoulli by rank": (
        {**MINIMAL, "exclusive": {"method": "bernoulli", "rank": 2}},
        ["bernoulli", "needs `ratio`", "not `rank`"],
    ),
    "sparse integers": (
        {**MINIMAL, "exclusive": {"method": "magnitude", "ratio": 0.1, "dtype": "int8"}},
        ["magnitude", "fp32 or bf16", "int8"],
    ),
    "energy and budget": ({**MINIMAL, "exclusive": {"energy": 0.5, "budget": 0.1}}, ["energy and budget", "not both"]),
    "energy above one": ({**MINIMAL, "exclusive": {"energy": 1.01}}, ["energy", "at most 1", "1.01"]),
    "energy zero": ({**MINIMAL, "exclusive": {"energy": 0}}, ["energy", "above 0"]),
    "budget zero": ({**MINIMAL, "exclusive": {"budget": 0}}, ["budget", "above 0"]),
    "budget text": ({**MINIMAL, "exclusive": {"budget": "5%"}}, ["budget", "number", "'5%'"]),
    "rank zero": ({**MINIMAL, "exclusive": {"rank": 0}}, ["rank", "at least 1", "0"]),
    "rank float": ({**MINIMAL, "exclusive": {"rank": 2.5}}, ["rank", "integer", "2.5"]),
    "rank true": ({**MINIMAL, "exclusive": {"rank": True}}, ["rank", "integer"]),
    "rank and ratio": ({**MINIMAL, "exclusive": {"rank": 2, "ratio": 0.5}}, ["rank", "ratio", "not both"]),
    "ratio zero": ({**MINIMAL, "exclusive": {"ratio": 0}}, ["ratio", "above 0 and at most 1"]),
    "ratio above one": ({**MINIMAL, "exclusive": {"ratio": 1.5}}, ["ratio", "at most 1", "1.5"]),
    "ratio nan": ({**MINIMAL, "exclusive": {"ratio": float("nan")}}, ["ratio"]),
    "ratio text": ({**MINIMAL, "exclusive": {"ratio": "half"}}, ["ratio", "'half'"]),
    "factor dtype": ({**MINIMAL, "exclusive": {"dtype": "int2"}}, ["dtype", "fp32", "bf16", "int8", "int4", "'int2'"]),
    "factor dtype a list": ({**MINIMAL, "exclusive": {"dtype": ["fp32"]}}, ["dtype", "fp32"]),
    "router type": (
        {**MINIMAL, "router": "magic"},
        ["type", "auto, linear, mlp, centroid, lexical, knn, projection", "'magic'"],
    ),
    "router number": ({**MINIMAL, "router": 3}, ["router", "mapping"]),
    "router false": ({**MINIMAL, "router": False}, ["router"]),
    "router an empty list": ({**MINIMAL, "router": []}, ["router"]),
    "router pass": (two(router={"pass": "early"}), ["pass", "prefix, full, late", "'early'"]),
    "late without a layer": (two(router={"pass": "late"}), ["late", "needs `router.layer`"]),
    "layer negative": (two(router={"layer": -1}), ["layer", "at least 0"]),
    "layer text": (two(router={"layer": "middle"}), ["layer", "integer"]),
    "temperature": (two(router={"temperature": 0}), ["temperature", "above 0"]),
    "temperature text": (two(router={"temperature": "hot"}), ["temperature", "number"]),
    "top_k zero": (two(router={"top_k": 0}), ["top_k", "at least 1"]),
    "top_k too large": (two(router={"top_k": 3}), ["top_k", "3", "2 experts"]),
    "epochs": (two(router={"epochs": 0}), ["epochs", "at least 1"]),
    "lr": (two(router={"lr": -0.1}), ["lr", "above 0"]),
    "router rank": (two(router={"rank": 0}), ["rank", "at least 1"]),
    "rows": (two(router={"rows": 1}), ["rows", "at least 2"]),
    "trained router without data": ({**MINIMAL, "router": "linear"}, ["'linear'", "data", "'a'", "projection"]),
    "projection of a full pass": (two(router={"type": "projection", "pass": "full"}), ["pass", "projection"]),
    "data number": (one(data=3), ["experts[0]", "data"]),
    "data without train": (one(data={"validation": "v"}), ["data", "train"]),
    "data train null": (one(data={"train": None}), ["data.train", "JSONL"]),
    "labels text": (one(labels="yes"), ["labels", "list"]),
    "labels empty": (one(labels=[]), ["labels", "list"]),
    "labels twice": (one(labels=["x", "x"]), ["labels", "different"]),
    "labels numbers": (one(labels=[0, 1]), ["labels", "quote numbers"]),
    "include number": ({**MINIMAL, "include": 5}, ["include", "regular expression"]),
    "include zero": ({**MINIMAL, "include": 0}, ["include", "regular expression"]),
    "include false": ({**MINIMAL, "include": False}, ["include", "regular expression"]),
    "exclude broken": ({**MINIMAL, "exclude": ["("]}, ["exclude", "regular expression", "'('"]),
    "dtype": ({**MINIMAL, "dtype": "float16"}, ["dtype", "float32, float64", "'float16'"]),
    "out_dtype": ({**MINIMAL, "out_dtype": "int8"}, ["out_dtype", "bfloat16", "'int8'"]),
    "seed negative": ({**MINIMAL, "seed": -1}, ["seed", "at least 0"]),
    "seed text": ({**MINIMAL, "seed": "1"}, ["seed", "integer"]),
    "seed beyond what torch takes": ({**MINIMAL, "seed": 1 << 64}, ["seed"]),
    "trust text": ({**MINIMAL, "trust_remote_code": "yes"}, ["trust_remote_code", "true or false"]),
    "alignment": ({**MINIMAL, "alignment": "zip"}, ["alignment", "none", "cannot be undone", "--mode zip"]),
    "name with a slash": (one(name="a/b"), ["'a/b'", "letters"]),
    "name with a space": (one(name="a b"), ["'a b'", "letters"]),
    "name with a newline": (one(name="a\n"), ["letters"]),
    "name empty": (one(name=""), ["''", "letters"]),
    "name a number": (one(name=3), ["3", "letters"]),
    "name null": (one(name=None), ["None", "letters"]),
    "name not ASCII": (one(name="é"), ["'é'", "letters"]),
    **{
        f"name {n}": (one(name=n), [n, "reserved"]) for n in ("all", "None", "Base", "shared", "__SHARED__", "__base__")
    },
    "names twice": (
        {"experts": [{"name": "a", "model": "x"}, {"name": "a", "model": "y"}]},
        ["'a'", "ignoring case"],
    ),
    "names twice but for case": (
        {"experts": [{"name": "Sst2", "model": "x"}, {"name": "sST2", "model": "y"}]},
        ["'Sst2'", "'sST2'", "ignoring case"],
    ),
    "names twice by default": ({"experts": [{"model": "x/a"}, {"model": "y/a@v2"}]}, ["'a'", "ignoring case"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_says_what_is_wrong(case):
    content, expected = BAD[case]
    with pytest.raises(TwinMergingError) as caught:
        parse_recipe(content)
    for part in expected:
        assert part in str(caught.value)


BAD_FILES = {
    "not UTF-8": (b"experts: \xff", "not UTF-8"),
    "not YAML": ("experts: [", "not valid YAML"),
    "a control character": ("\x00", "not valid YAML"),
    "key twice": ("seed: 1\nseed: 2\n", "'seed' is given twice"),
    "key twice, nested": ("router: {rank: 1, rank: 2}\n", "'rank' is given twice"),
    "a list as key": ("? [a]\n: 1\n", "not valid YAML"),
    "an impossible date": ("seed: 2020-99-99\n", "not valid YAML"),
    "an integer that is none": ("seed: !!int abc\n", "not valid YAML"),
    "a flag that is none": ("seed: !!bool maybe\n", "not valid YAML"),
    "brackets without end": ("[" * 3000, "not valid YAML"),
    "an unknown tag": ("seed: !what 5\n", "not valid YAML"),
    "empty": ("", "mapping"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_recipe_file_is_named(tmp_path, case):
    text, expected = BAD_FILES[case]
    with pytest.raises(TwinMergingError, match=re.escape(expected)) as caught:
        load_recipe(write(tmp_path, text))
    assert "recipe.yaml" in str(caught.value)


def test_a_missing_recipe_file_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(TwinMergingError, match="is a folder; give the file in it"):
        load_recipe(tmp_path)
    with pytest.raises(TwinMergingError, match="does not exist; `twin-merging init"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"]
)
def test_python_tags_run_nothing(tmp_path, tag):
    planted = tmp_path / "planted"
    with pytest.raises(TwinMergingError, match="not valid YAML"):
        load_recipe(write(tmp_path, f"experts: {tag} ['touch {planted}']\n"))
    assert not planted.exists()


def test_rank_is_bounded_by_the_matrix_and_ratio_is_at_least_one():
    assert Exclusive(rank=16).rank_of(4, 9) == 4
    assert Exclusive(rank=3).rank_of(4, 9) == 3
    assert Exclusive(rank=None, ratio=0.5).rank_of(8, 20) == 4
    assert Exclusive(rank=None, ratio=0.01).rank_of(8, 20) == 1
    assert Exclusive(rank=None, ratio=1.0).rank_of(8, 20) == 8


EXCLUSIVE = {
    "energy": ({"energy": 0.9, "dtype": "int4"}, Exclusive("svd", None, None, "int4", energy=0.9)),
    "all energy": ({"energy": 1}, Exclusive("svd", None, energy=1.0)),
    "budget": ({"budget": 0.05, "dtype": "int8"}, Exclusive("svd", None, None, "int8", budget=0.05)),
    "a budget above the model": ({"budget": 2}, Exclusive("svd", None, budget=2.0)),
    "magnitude": ({"method": "magnitude", "ratio": 0.1}, Exclusive("magnitude", None, 0.1)),
    "bernoulli": ({"method": "bernoulli", "ratio": 1, "dtype": "bf16"}, Exclusive("bernoulli", None, 1.0, "bfloat16")),
}


@pytest.mark.parametrize("case", EXCLUSIVE)
def test_ways_to_size_the_deltas(case):
    content, expected = EXCLUSIVE[case]
    assert parse_recipe({**MINIMAL, "exclusive": content}).exclusive == expected


def test_include_and_exclude_match_in_full():
    recipe = parse_recipe({**MINIMAL, "include": ["a\\..*", "b"], "exclude": "a\\.x"})
    assert [recipe.gets_delta(name) for name in ("a.y", "b", "b.c", "a.x", "c")] == [True, True, False, False, False]
    assert parse_recipe(MINIMAL).gets_delta("anything")


@pytest.mark.parametrize("key", ["merge_method: ties", "merge_method: task_arithmetic", "shared_model: base"])
def test_a_base_that_is_needed_must_be_named_by_somebody(key):
    name, value = key.split(": ")
    with pytest.raises(TwinMergingError, match=f"`{key}` needs `base_model`"):
        check_base(parse_recipe({**MINIMAL, name: value}))
    check_base(parse_recipe({**MINIMAL, name: value, "base_model": "b"}))
