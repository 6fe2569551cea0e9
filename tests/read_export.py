"""What transformers makes of exports and of the folders that they were made from, as one JSON list.

    python tests/read_export.py EXPORT SOURCE IDS.npy LOGITS.npy [EXPORT SOURCE ...]

Runs in the environments of transformers 4 and of 5 (with torch), where opd_jax is not. To start it
takes longer than to read an export, so it reads many; of one that it cannot read it says why.
"""

import itertools
import json
import sys
import traceback

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = (
    "Tom has 3 apples and 12 pears.",
    "  two  spaces\n\n\tand a tab ",
    "naïve café, 你好 🙂 e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|begin_of_text|><|eot_id|>",
    "<tool_call>\n{}\n</tool_call><think>it's</think>",
    "1234567 + 8",
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 4?"},
    {"role": "assistant", "content": "21"},
    {"role": "user", "content": "And it's doubled? "},
]


def told(folder: str) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        "class": type(tokenizer).__name__,
        "length": len(tokenizer),
        "ids": rows,
        "texts": [tokenizer.decode(row) for row in rows],
        "without_special": [tokenizer.decode(row, skip_special_tokens=True) for row in rows],
        "special": {name: getattr(tokenizer, name) for name in names},
        "all_special": sorted(map(str, tokenizer.all_special_tokens)),
        "chat": [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_open)
            for chat in (CHAT, CHAT[1:2])
            for is_open in (False, True)
        ],
    }


def read(export: str, source: str, ids: str, logits: str) -> dict:
    model, report = AutoModelForCausalLM.from_pretrained(
        export, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        np.save(logits, model(torch.tensor(np.load(ids)).long()).logits.numpy())
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {
        "version": transformers.__version__,
        "export": told(export),
        "source": told(source),
        "stray": sorted(str(key) for kind in kinds for key in report[kind]),
        "eos": model.generation_config.eos_token_id,
        "bos": model.config.bos_token_id,
        "temperature": model.generation_config.temperature,
    }


def main(*paths: str) -> None:
    results = []
    for job in itertools.zip_longest(*[iter(paths)] * 4):
        try:
            results.append(read(*job))
        except Exception:
            results.append({"error": traceback.format_exc()})
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
