"""What leaves an artifact: one expert as a plain checkpoint, a fixed mixture, and LoRAs for PEFT.

    python examples/export.py work/artifact out

The merged checkpoint is loaded again without this package and compared.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import twin_merging_hf  # noqa: F401  registers the model type
from twin_merging_hf.export import describe_export, export_adapters, export_merged


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("artifact", type=Path)
    options.add_argument("out", type=Path)
    args = options.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(args.artifact).eval()
    first = model.expert_names[0]

    export_merged(args.artifact, args.out / "merged", first)
    plain = AutoModelForSequenceClassification.from_pretrained(args.out / "merged").eval()
    inputs = AutoTokenizer.from_pretrained(args.artifact)(["a text", "and another"], padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = model(**inputs, experts=first).expert_logits[:, slice(*model.label_space.spans[0])]
        difference = float((plain(**inputs).logits - ours).abs().max())
    print(f"{args.out / 'merged'}: a {type(plain).__name__}; its logits differ by {difference:.1e} from the artifact's")

    found = export_adapters(args.artifact, args.out / "peft")
    print("\n".join(describe_export(found)))
    print(f"next: {found.next}")


if __name__ == "__main__":
    main()
