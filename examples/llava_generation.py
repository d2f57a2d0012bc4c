"""Answers about pictures from a LLaVA whose image tokens are pruned while it reads the prompt.

Shows   which configuration suits a language model that is not trained afterwards, and what `generate` and its cache save.
Needs   pip install 'madtp[hf]'
Prints  MACs of the prompt, size of the key/value cache, right answers, answers as the dense model's, and some of them.

`llava_mini` is transformers' LlavaForConditionalGeneration with small weights that ship with madtp; the comments show the
lines for a published checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

import madtp
import zoo
from zoo.llava.conversation import Turn, prompts, spoken
from zoo.transforms.images import for_model

QUESTIONS = 24


def ask(split: str, count: int, image_tokens: int) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Return prompts about drawn pictures as the model takes them, the questions, and the right answers."""
    data = zoo.data("scenes_questions", split=split, limit=count, transform=for_model("llava_mini"))
    samples = [data[index] for index in range(count)]
    questions = [sample.record.question for sample in samples]
    # With a published checkpoint, the processor does all of this: processor(images=..., text=..., padding=True), which pads on
    # the left, so that all prompts of a batch end where their answers begin.
    ids, mask = prompts([[Turn(question)] for question in questions], image_tokens)
    pixels = torch.cat([sample.images for sample in samples])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return inputs, questions, [sample.record.answers[0] for sample in samples]


def answers(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """Return what the model writes behind each prompt."""
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return [spoken(row) for row in written[:, inputs["input_ids"].shape[1] :].tolist()]


def equal(answers: list[str], others: list[str]) -> int:
    return sum(one == other for one, other in zip(answers, others, strict=True))


def main() -> None:
    torch.set_num_threads(1)
    # model = LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")
    model = zoo.create("llava_mini", checkpoint="dense")
    image_tokens = model.config.image_seq_length
    inputs, questions, right = ask("test", QUESTIONS, image_tokens)
    calibration, _, _ = ask("val", 8, image_tokens)

    # What a vision tower drops is gone before a word was read. So leave it whole, and drop tokens in the language model.
    config = madtp.PruningConfig(selection="distinct", layers={"*vision*": ()})
    pruned = madtp.rewrite(model, calibration, config=config)
    found = madtp.calibrate(pruned, [calibration], reduction=0.4)
    print(f"prompt: {found.macs / 1e6:.0f} M MACs in place of {found.dense_macs / 1e6:.0f} M")

    dense_answers, pruned_answers = answers(model, inputs), answers(pruned, inputs)
    held, whole = pruned.madtp.cache_bytes()
    print(f"key/value cache: {held / 2**20:.1f} MiB in place of {whole / 2**20:.1f} MiB")
    print(f"dense: {equal(dense_answers, right)} of {QUESTIONS} answers are right")
    print(
        f"pruned: {equal(pruned_answers, right)} are right, {equal(pruned_answers, dense_answers)} are the dense model's"
    )
    for question, given in list(zip(questions, pruned_answers, strict=True))[:3]:
        print(f"  {question}? {given}")


if __name__ == "__main__":
    main()
