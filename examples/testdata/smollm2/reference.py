"""Writes reference.json: what SmolLM2-135M-Instruct (Q4_1, GGUF) says, by a forward pass of its own in numpy, F32 throughout.

    pip install numpy gguf tokenizers
    python reference.py SmolLM2-135M-Instruct.Q4_1.gguf > reference.json
"""

import json
import sys

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, models, pre_tokenizers

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, EPS, THETA = 30, 576, 9, 3, 64, 1e-5, 100000.0
STARTS, ENDS = "<|im_start|>", "<|im_end|>"

reader = GGUFReader(sys.argv[1])
weights = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
pieces = reader.fields["tokenizer.ggml.tokens"].contents()
merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.add_special_tokens(["<|endoftext|>", STARTS, ENDS])


def norm(x, w):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPS) * w


def rope(x):
    angles = np.arange(len(x))[:, None] * THETA ** (-np.arange(0, DIM, 2) / DIM)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def logits(ids):
    """Logits [positions, vocabulary]."""
    n = len(ids)
    x = weights["token_embd.weight"][ids]
    mask = np.tril(np.ones((n, n), bool))
    for i in range(LAYERS):
        w = lambda name: weights[f"blk.{i}.{name}.weight"]
        h = norm(x, w("attn_norm"))
        q = rope((h @ w("attn_q").T).reshape(n, HEADS, DIM))
        k = np.repeat(rope((h @ w("attn_k").T).reshape(n, KV_HEADS, DIM)), HEADS // KV_HEADS, 1)
        v = np.repeat((h @ w("attn_v").T).reshape(n, KV_HEADS, DIM), HEADS // KV_HEADS, 1)
        scores = np.where(mask, np.einsum("thd,shd->hts", q, k) / np.sqrt(DIM), -np.inf)
        x = x + np.einsum("hts,shd->thd", softmax(scores), v).reshape(n, HIDDEN) @ w("attn_output").T
        h = norm(x, w("ffn_norm"))
        gate = h @ w("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w("ffn_up").T)) @ w("ffn_down").T
    return norm(x, weights["output_norm.weight"]) @ weights["token_embd.weight"].T


def greedy(ids, count):
    """The most likely continuation, and by how much each token led the next best."""
    ids, leads = list(ids), []
    for _ in range(count):
        last = logits(ids)[-1]
        best, second = np.argsort(-last)[:2]
        leads.append(round(float(last[best] - last[second]), 3))
        ids.append(int(best))
    return ids, leads


TEXTS = [
    "The sea was calm, and nobody spoke.",
    "  two spaces, then\ttabs\n\n\nand 3 line breaks",
    "In 1984 there were 10523 of them: 3.14159, -7e10 and 0x1F.",
    "Äpfel, naïve façade, Привет, 你好, こんにちは, 🙂👍🏽",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment",
    "I'll say it's John's; they've gone, we'd stay. DON'T!",
    f"{STARTS}user\nHi{ENDS}\n",
]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTIONS = ["What is the capital of France?", "Write the numbers from one to ten in words."]


def chat(question):
    text = f"{STARTS}system\n{SYSTEM}{ENDS}\n{STARTS}user\n{question}{ENDS}\n{STARTS}assistant\n"
    prompt = tokenizer.encode(text).ids
    ids, leads = greedy(prompt, 12)
    return {"question": question, "ids": ids[len(prompt) :], "leads": leads}


prompt = tokenizer.encode("The first people who crossed the mountains found a valley where a river ran south, and there they").ids
last = logits(prompt)[-1]
print(
    json.dumps(
        {
            "tokenizer": [{"text": text, "ids": tokenizer.encode(text).ids} for text in TEXTS],
            "prompt": {"ids": prompt, "first_logits": [round(float(x), 4) for x in last[:64]]},
            "chat": [chat(question) for question in QUESTIONS],
        },
        ensure_ascii=False,
        indent=1,
    )
)
