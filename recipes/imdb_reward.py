"""The gold reward of the DPO paper's sentiment experiment: how likely a review is a good one.

    python evaluate.py --gold recipes/imdb_reward.py:sentiment

SENTIMENT_MODEL, from the environment, names the classifier: a folder or a hub name of any sequence
classifier of transformers with a label "positive". Needs `pip install torch transformers`.
"""

import functools
import os

CLASSIFIER = os.environ.get("SENTIMENT_MODEL", "siebert/sentiment-roberta-large-english")
BATCH_SIZE = 64  # texts at once
MAX_LENGTH = 512  # of the classifier's tokens, as the authors cut


@functools.cache
def load_classifier():
    """(tokenizer, model, column of "positive"); on a card where torch sees one."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(CLASSIFIER)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(CLASSIFIER).eval()
    names = [model.config.id2label[i].lower() for i in range(model.config.num_labels)]
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return tokenizer, model, names.index("positive")


def sentiment(prompts, completions, **_):
    """The probability of "positive" [B] that the classifier gives to prompt and completion."""
    import torch

    tokenizer, model, positive = load_classifier()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
    scores = []
    for start in range(0, len(texts), BATCH_SIZE):
        part = texts[start : start + BATCH_SIZE]
        cut = {"truncation": True, "max_length": MAX_LENGTH, "padding": True}
        inputs = tokenizer(part, return_tensors="pt", **cut).to(model.device)
        with torch.no_grad():
            scores += model(**inputs).logits.softmax(dim=-1)[:, positive].tolist()
    return scores
