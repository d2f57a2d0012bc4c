"""Compare rules of pruning a language model's image tokens, at equal MACs: ``llava_mini`` on questions about scenes.

    python benchmarks/language_model_rules.py run --output runs/rules                         # without training
    python benchmarks/language_model_rules.py run --output runs/rules --steps 300 --shares 0.89
    python benchmarks/language_model_rules.py time --output runs/rules
    python benchmarks/language_model_rules.py table --output runs/rules

A *share* is the fraction of the image tokens that a rule drops behind the attention of the first decoder layer. Each rule is
calibrated to the MACs that this saves, so that those which also prune the tower, or further layers, cost the same. Rules with
``one-site`` prune where the others do, those with ``decoder`` behind each of its layers, and ``madtp`` in the tower, too.
``last-token-at-2`` stands where its paper has it, behind the second layer, and saves less. ``class-token`` prunes in the last
layer of the tower, and the decoder begins with what is left. ``run`` resumes, and leaves a card for each model; ``time``
measures prefill, step and cache of all of them in turns.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from rich.console import Console

import madtp
import zoo
from madtp.atomic_files import write_text
from madtp.benchmark import Limits, Run, describe_environment, time_interleaved
from madtp.benchmark.generation import GenerationMeasurement
from madtp.tokens.cache_bytes import bytes_of_caches
from madtp.training.config import TrainingConfig
from madtp.training.run import read_config, train
from zoo.benchmark.bench import kept_of
from zoo.benchmark.continuing import Continuing, cache_of, form_of_steps
from zoo.benchmark.generators import CACHES
from zoo.benchmark.measuring import LIBRARIES
from zoo.recipes.controls import reopen, training_free
from zoo.recipes.model_card import held_out_calls, test_task

MODEL, DATA = "llava_mini", "scenes_questions"
SHARES = (0.5, 0.67, 0.78, 0.89)


def _in_decoder(*layers: int, **fields: object) -> dict[str, object]:
    """Fields of the configuration that prunes behind some decoder layers alone."""
    return {"layers": {"*language_model*": [*layers], "*": []}, **fields}


def _rule(selection: str, layer: int = 0) -> dict[str, object]:
    return _in_decoder(layer, selection=selection, keep_ratio=0.5, alignment=False)


RULES: dict[str, dict[str, object]] = {
    "madtp": {},
    "madtp-decoder": _in_decoder(*range(5)),
    "madtp-one-site": _in_decoder(0),
    "distinct-decoder": _in_decoder(*range(5), selection="distinct"),
    "distinct-one-site": _in_decoder(0, selection="distinct"),
    "random": _rule("random"),
    "last-token": _rule("last_token_attention"),
    "last-token-at-2": _rule("last_token_attention", 1),
    "class-token": {
        **_rule("class_token_attention"),
        "layers": {"*vision_tower*": [5], "*language_model*": [0]},
    },
    "diversity": _rule("diversity"),
    "conditional-diversity": _rule("conditional_diversity"),
}
"""Fields of the configuration of each rule."""

ALIKE = ("last-token", "last-token-at-2", "class-token", "diversity", "conditional-diversity")
"""Rules that do the same with any seed, unless they are trained: they run with the first one."""

ELSEWHERE = ("last-token-at-2",)
"""Rules whose MACs are not those of :data:`REFERENCE`."""
REFERENCE = "diversity"


@dataclass(frozen=True)
class FinishedRun:
    """One model, whose folder holds its card.

    Attributes:
        folder: where it is.
        rule: one of :data:`RULES`.
        share: fraction of the image tokens that were to go.
        steps: training steps.
        seed: seed of teaching and training.
        card: content of its card.
    """

    folder: Path
    rule: str
    share: float
    steps: int
    seed: int
    card: Mapping[str, Any]


def finished_runs(output: Path) -> Iterator[FinishedRun]:
    """Yield every finished run below ``output``."""
    for path in sorted(output.glob("*/*/*/pruned/card.json")):
        rule, share, name = path.parts[-5:-2]
        steps, seed = name.removeprefix("steps-").split("-seed-")
        yield FinishedRun(
            path.parent, rule, float(share) / 100, int(steps), int(seed), json.loads(path.read_text("utf-8"))
        )


def reductions(output: Path) -> dict[str, float]:
    """Return the fraction of the MACs that each rule saves, by ``"SITE SHARE"``; measured once."""
    path = output / "reductions.json"
    known: dict[str, float] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    missing = [(rule, share) for rule in (REFERENCE, *ELSEWHERE) for share in SHARES if f"{rule} {share}" not in known]
    if missing:
        dense = zoo.create(MODEL, "dense")
        calls = held_out_calls(MODEL, DATA, split="val", items=64, seed=0)
        for rule, share in missing:
            config = madtp.PruningConfig.from_dict({**RULES[rule], "keep_ratio": 1 - share})
            kept = kept_of(madtp.rewrite(dense, calls[0], config=config).eval(), calls)
            known[f"{rule} {share}"] = 1 - sum(one.macs for one in kept) / sum(one.dense_macs for one in kept)
        write_text(path, json.dumps(known, indent=1) + "\n")
    return known


def run(rule: str, share: float, seed: int, options: argparse.Namespace) -> None:
    """Make one model, unless its card is there."""
    output = options.output / rule / f"{100 * share:.0f}" / f"steps-{options.steps}-seed-{seed}"
    if (output / "pruned" / "card.json").exists():
        return
    content = read_config(Path(zoo.__file__).parent / "recipes" / f"{MODEL}_compress.toml")
    content["training"] |= {"seed": seed, "threads": options.threads}
    settings = content["settings"]
    settings["pruning"] = {**settings["pruning"], **RULES[rule]}
    if "keep_ratio" in RULES[rule]:
        settings["pruning"]["keep_ratio"] = 1 - share  # where calibration begins
    settings["reduction"] = reductions(options.output)[f"{rule if rule in ELSEWHERE else REFERENCE} {share}"]
    if options.steps:
        content["training"]["steps"] = options.steps
        train(content, output, resume=True)
    else:
        training_free(settings, TrainingConfig.from_dict(content["training"]), output)


def measure_dense(output: Path) -> dict[str, float]:
    """Return the scores of the dense model on the samples that runs are tested on, measured once."""
    path = output / "dense.json"
    if not path.exists():
        test = test_task(zoo.create(MODEL, "dense"), MODEL, DATA, items=1024, seed=0)
        write_text(path, json.dumps(test, indent=1) + "\n")
    scores: dict[str, float] = json.loads(path.read_text("utf-8"))["metrics"]
    return scores


def measure_times(output: Path, options: argparse.Namespace) -> None:
    """Time the dense model and all that were made, in turns, and write ``OUTPUT/times.json``."""
    torch.set_num_threads(options.threads)
    dense = zoo.create(MODEL, "dense").eval()
    calls = held_out_calls(MODEL, DATA, split="test", items=4 * options.batch, seed=0, batch_size=options.batch)
    models = {"dense": dense}
    for found in finished_runs(output):
        if found.seed == 0:
            models[f"{found.rule} {found.share} {found.steps}"] = reopen(found.folder)
    taken = inspect.signature(dense.forward).parameters
    form = form_of_steps(dense, next(name for name in CACHES if name in taken), calls[0])
    entrants = {name: Continuing(_blank(name, model, calls, options.batch), model) for name, model in models.items()}
    runs = [Run(name, partial(one.generate, calls, form)) for name, one in entrants.items()]
    limits = Limits(options.rounds, 1, None)
    for timed in time_interleaved(runs, len(calls), limits):
        for one in entrants.values():
            one.finish(timed)
    measured = {name: one.measurement for name, one in entrants.items()}
    content = {
        "batch": options.batch,
        "threads": options.threads,
        "environment": asdict(describe_environment(LIBRARIES)),
        "models": {
            name: {
                "prefill_ms": median(one.prefill.wall_ms),
                "step_ms": median(one.step.wall_ms),
                "cache_bytes": one.cache_bytes,
            }
            for name, one in measured.items()
        },
    }
    write_text(output / "times.json", json.dumps(content, indent=1) + "\n")


def _blank(
    name: str, model: torch.nn.Module, calls: list[dict[str, torch.Tensor]], batch: int
) -> GenerationMeasurement:
    """What is known of a model before it is timed."""
    sizes = []
    with torch.no_grad():
        for call in calls:
            sizes.append(bytes_of_caches([cache_of(model(**call, use_cache=True))]).held)
    image = int((calls[0]["input_ids"][0] == model.config.image_token_index).sum())
    return GenerationMeasurement(
        batch=batch,
        image_tokens=image,
        text_tokens=calls[0]["input_ids"].shape[1] - image,
        new_tokens=8,
        target=name,
        macs=0.0,
        cache_bytes=mean(sizes),
    )


def table(output: Path) -> str:
    """Return all cards below ``output`` as a markdown table."""
    dense = measure_dense(output)["vqa_accuracy"]
    path = output / "times.json"
    times = json.loads(path.read_text("utf-8"))["models"] if path.exists() else {}
    groups: dict[tuple[float, int, str], list[FinishedRun]] = defaultdict(list)
    for found in finished_runs(output):
        groups[found.share, found.steps, found.rule].append(found)
    rows = [
        "| image tokens dropped | steps | rule | MACs saved | accuracy | lost | seeds | prefill | step | cache |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"|  |  | dense |  | {dense:.1%} |  |  | ×1.00 | ×1.00 | ×1.00 |",
    ]
    order = list(RULES)
    for (share, steps, rule), runs in sorted(groups.items(), key=lambda e: (e[0][0], e[0][1], order.index(e[0][2]))):
        scores = [one.card["test"]["metrics"]["vqa_accuracy"] for one in runs]
        spread = f" ± {100 * stdev(scores):.1f}" if len(scores) > 1 else ""
        saved = mean(one.card["calibration"]["reduction"] for one in runs)
        ratios = _ratios(times, f"{rule} {share} {steps}")
        rows.append(
            f"| {share:.0%} | {steps} | {rule} | {saved:.1%} | {100 * mean(scores):.1f}%{spread} "
            f"| {100 * (dense - mean(scores)):.1f} | {len(scores)} | {' | '.join(ratios)} |"
        )
    return "\n".join(rows)


def _ratios(times: Mapping[str, Mapping[str, float]], name: str) -> list[str]:
    columns = ("prefill_ms", "step_ms", "cache_bytes")
    if name not in times:
        return [""] * len(columns)
    return [f"×{times[name][column] / times['dense'][column]:.2f}" for column in columns]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "time", "table"))
    parser.add_argument("rules", nargs="*", help=f"any of {', '.join(RULES)}; default all")
    parser.add_argument("--output", type=Path, default=Path("runs/rules"))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the image tokens, to drop")
    parser.add_argument("--steps", type=int, default=0, help="training steps; default 0, no training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=8, help="samples in a batch that is timed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_intermixed_args()  # rules may follow options
    if unknown := sorted(set(options.rules) - set(RULES)):
        parser.error(f"unknown rule {', '.join(unknown)}; known: {', '.join(RULES)}")
    if unknown := sorted(set(options.shares) - set(SHARES)):
        parser.error(f"unknown share {unknown[0]}; known: {', '.join(map(str, SHARES))}")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.command == "run":
        for seed in options.seeds:
            for share in sorted(options.shares, reverse=True):
                for rule in options.rules or RULES:
                    if options.steps or seed == options.seeds[0] or rule not in ALIKE:
                        run(rule, share, seed, options)
    elif options.command == "time":
        measure_times(options.output, options)
    Console(width=200).print(table(options.output), markup=False)


if __name__ == "__main__":
    main()
