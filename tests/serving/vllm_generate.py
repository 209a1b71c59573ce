"""Run in vLLM's environment: writes greedily after prompts, each with its adapter, all in one call. JSON in, JSON out."""

import json
import sys


def main(request: dict, out: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        request["base"], enable_lora=True, max_lora_rank=request["rank"], max_loras=len(request["adapters"]),
        dtype="float32", max_model_len=256, enforce_eager=True,
    )  # fmt: skip
    adapters = [LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(request["adapters"].items())]
    settings = SamplingParams(temperature=0.0, max_tokens=request["tokens"])
    loras = [next(each for each in adapters if each.lora_name == name) for name in request["names"]]
    outputs = engine.generate(request["prompts"], settings, lora_request=loras)
    with open(out, "w") as stream:
        json.dump([list(each.outputs[0].token_ids) for each in outputs], stream)


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        main(json.load(stream), sys.argv[2])
