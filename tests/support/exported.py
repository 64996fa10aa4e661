"""Compares exported models with what fairseq's gave: run where there is no fairseq, see ``elsewhere.py``.

Each argument is a folder with ``hf``, what was exported, and ``expected.pt``.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers


def difference(model, expected):
    """The greatest difference of logits where there is no padding."""
    tokens, targets = expected["src_tokens"], expected.get("prev_output_tokens")
    told = {"input_ids": tokens, "attention_mask": tokens.ne(1).long()}
    if targets is not None:
        told["decoder_input_ids"] = targets
    keep = (tokens if targets is None else targets).ne(1)
    return (model(**told).logits - expected["logits"])[keep].abs().max().item()


def cached_difference(model, expected):
    """The same between tokens one after the other and all at once, with padding before some of them."""
    tokens, targets = expected["src_tokens"], expected.get("prev_output_tokens")
    if targets is None:
        length = int(tokens.ne(1).sum(1).max())
        rows = [[1] * (length - len(x)) + x for x in ([y for y in z if y != 1] for z in tokens.tolist())]
        steps, told = torch.tensor(rows), {}
        mask, names = steps.ne(1).long(), ("input_ids", "attention_mask")
    else:
        steps, told = (
            targets,
            {
                "encoder_outputs": model.get_encoder()(tokens, attention_mask=tokens.ne(1).long()),
                "attention_mask": tokens.ne(1),
            },
        )
        mask, names = torch.ones_like(targets), ("decoder_input_ids", "decoder_attention_mask")
    whole = model(**{names[0]: steps, names[1]: mask}, **told).logits
    cache, parts = None, []
    for end in (3, *range(4, steps.shape[1] + 1)):
        start = 0 if cache is None else end - 1
        inputs = {names[0]: steps[:, start:end], names[1]: mask[:, :end]}
        out = model(**inputs, **told, past_key_values=cache, use_cache=True)
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        parts.append(out.logits)
    return (torch.cat(parts, 1) - whole)[mask.bool()].abs().max().item()


def main(folders):
    """Print a line of JSON for each folder."""
    for name in ("fairseq", "fairseq_evomoe"):
        assert importlib.util.find_spec(name) is None, f"{name} can be imported"
    for folder in map(Path, folders):
        expected = torch.load(folder / "expected.pt")
        auto = getattr(transformers, expected["auto"])
        model, info = auto.from_pretrained(
            folder / "hf", trust_remote_code=True, output_loading_info=True, torch_dtype="auto"
        )
        model.eval()
        with torch.no_grad():
            found = {"folder": folder.name, "difference": difference(model, expected)}
            if "generated" in expected:
                found["cached"] = cached_difference(model, expected)
                prompt, wanted = expected["prompt"], expected["generated"]
                mask = prompt.ne(1).long()
                made = model.generate(
                    prompt, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=expected["most"]
                )
                made = made[:, 1:] if model.config.is_encoder_decoder else made[:, prompt.shape[1] :]
                found["generated"] = [[x for x in row if x != 1] for row in made.tolist()]
                found["as_fairseq"] = found["generated"] == wanted
        found["faults"] = sorted(str(key) for keys in info.values() for key in keys)
        if "text" in expected:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=True)
            found["tokens"] = tokenizer(expected["text"])["input_ids"]
            found["text"] = tokenizer.batch_decode(found["tokens"], skip_special_tokens=True)
        print("FOUND", json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
