"""Every expert answers the same text in one call: experts="all".

    python examples/several_questions.py work/artifact "Orbit was reached today."

A text is routed to one expert if they are rivals ("whose text is this?"). If they ask different questions about the
same text (topic, sentiment, author), all answers are wanted, and one pass gives them.
"""

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer

import twin_merging_hf  # noqa: F401  registers the model type


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("artifact")
    options.add_argument("text", nargs="+")
    args = options.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.artifact)
    model = AutoModelForSequenceClassification.from_pretrained(args.artifact)

    inputs = tokenizer(args.text, padding=True, truncation=True, return_tensors="pt")
    logits = model(**inputs, experts="all").logits  # [text, expert, label]: log-probabilities over all experts' labels
    weights = model.route(**inputs)  # [text, expert]
    for text, rows, row_weights in zip(args.text, logits, weights, strict=True):
        print(text)
        for name, row, weight in zip(model.expert_names, rows, row_weights, strict=True):
            label = int(row.argmax())  # an expert's own labels hold all of its probability
            print(
                f"  {name}: {model.config.id2label[label]} ({row[label].exp():.2f}); the router gives it {weight:.2f}"
            )


if __name__ == "__main__":
    main()
