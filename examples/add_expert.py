"""An expert leaves an artifact and comes back, without building anything else again.

    python examples/add_expert.py work        # after examples/text/make_experts.py and `twin-merging build`

The other expert's deltas and head keep every byte; the router is trained again on everybody's rows.
"""

import argparse
from pathlib import Path

from twin_merging_hf.artifact import inspect_artifact
from twin_merging_hf.editing import Newcomer, add_expert, remove_expert


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("work", type=Path)
    options.add_argument("--name", default="election", help="the expert (%(default)s)")
    args = options.parse_args()
    whole, without, again = (args.work / name for name in ("artifact", "without", "again"))

    remove_expert(whole, args.name, without)
    print(f"{without}: {[expert['name'] for expert in inspect_artifact(without).experts]}")

    rows = args.work / "data" / f"{args.name}.train.jsonl"
    newcomer = Newcomer(args.name, str((args.work / "experts" / args.name).resolve()), rows)
    result = add_expert(without, again, newcomer, recipe=args.work / "recipe.yaml")
    print(f"{again}: {[expert['name'] for expert in inspect_artifact(again).experts]}")
    print(f"agreement with the experts themselves on held-out rows: {result.verdict.agreement}")


if __name__ == "__main__":
    main()
