"""Ask LLaVA-1.5 about an image with all of its visual tokens, and with a few of them.

python examples/llava.py --image photo.jpg --question "What is on the table?" --keep 64
"""

from __future__ import annotations

import argparse
import time

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate


def budget(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask LLaVA about an image, unpruned and pruned.")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="hub id or folder")
    parser.add_argument("--image", required=True)
    parser.add_argument("--question", default="What is shown in this image?")
    parser.add_argument("--keep", type=budget, default=64, help="tokens (64) or a share of them (0.25)")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(
        args.model, dtype="auto", device_map=device, use_safetensors=True
    ).eval()
    prompt = f"USER: {processor.image_token}\n{args.question} ASSISTANT:"
    image = Image.open(args.image).convert("RGB")
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(device, model.dtype)

    def answer() -> str:
        started = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return f"{text}  [{time.perf_counter() - started:.2f} s]"

    answer()  # warm-up
    print("all tokens:", answer())
    with foveate.attach(model, foveate.VisPruner(keep=args.keep)) as handle:
        answer()  # warm-up
        pruned = answer()
        (span,) = handle.selections[0]
    print(f"{len(span)} of {span.length} tokens:", pruned)


if __name__ == "__main__":
    main()
