"""Runs to start, and run folders as training leaves them, made up in milliseconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pivot.config_load import load_config, to_yaml
from pivot.evaluate import intervals
from pivot.evaluate.outcomes import Outcomes, SampleAnswer, keep
from pivot.evaluate.preference import PREFERENCE
from pivot.evaluate.rewards import REWARDS
from pivot.evaluate.vqa import VQA
from pivot.report.read import LogRow
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

COMPONENTS = ("vision_tower", "projector", "language_model")
SETTINGS = """
output_dir: {folder}
init_from: {init_from}
deepspeed: ds_configs/zero3.json
model: {{vision_tower: {{path: vision.json}}, language_model: {{path: language.json}}}}
data: {{train: {train}, eval: {held_out}}}
optim: {{vision_tower: {{lr: 2e-5}}, projector: {{lr: 1e-4}}, language_model: {{lr: 5e-5}}}}
train: {{global_batch_size: 64, max_steps: {steps}}}
"""


DPO_RUN = """
output_dir: {folder}/run
init_from: {folder}/llava
data: {{train: {folder}/set, cache_dir: {folder}/cache, workers: 0}}
objective: {{dpo: {{}}}}
optim: {{vision_tower: {{lr: 1e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 1e-4}}}}
train: {{global_batch_size: 4, max_steps: 1}}
"""


def write_dpo_run(folder: Path) -> Path:
    """`run.yaml` of one DPO step in `folder`, with the tiny model and the 24 pairs that it names."""
    tiny_llava(folder / "llava")
    make_set(folder)
    (folder / "run.yaml").write_text(DPO_RUN.format(folder=folder))
    return folder


def make_run(
    folder: Path,
    objective: str,
    questions: list[SampleAnswer],
    *,
    held_out: str,
    skill: tuple[float, float],
    init_from: Path | None = None,
    steps: int = 120,
    seed: int = 0,
    num_samples: int = 600,
) -> Path:
    """A finished run whose held-out answers go from the one `skill` (a share) to the other."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    source = folder / "source.yaml"
    init = "null" if init_from is None else str(init_from / "export")
    source.write_text(
        SETTINGS.format(folder=folder, init_from=init, train="sets/train", held_out=held_out, steps=steps)
    )
    config = load_config(source, [], objective)
    source.unlink()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "status").write_text('{"status": "done"}\n')
    rows = [_start(steps)] + [_step(step, steps, objective, random) for step in range(1, steps + 1)]
    for step in sorted({0, steps // 3, 2 * steps // 3, steps}):
        share = skill[0] + (skill[1] - skill[0]) * (1 - math.exp(-3 * step / steps)) / (1 - math.exp(-3))
        outcomes = _outcomes(share, num_samples)
        rows.append(_evaluation(step, steps, objective, outcomes))
        keep([_answer(question, share, index) for index, question in enumerate(questions)], outcomes, folder, step)
    rows += [{"event": "save", "step": step, "wait_s": 1.5, "write_s": 9.5, "copied": True} for step in (60, 120)]
    rows.append(_end(steps))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _start(steps: int) -> LogRow:
    return {
        "event": "start",
        "world_size": 2,
        "device": "cpu",
        "dtype": "torch.float32",
        "zero_stage": 3,
        "total_steps": steps,
        "num_parameters": {"vision_tower": 612352, "projector": 33024, "language_model": 857216},
        "num_pairs": 11963,
        "exclusions": {"chosen equals rejected": 12, "longer than data.max_tokens": 25},
        "plan_fingerprint": "5f1c3a" * 10,
        "versions": {"pivot": "0.2.0", "torch": "2.15.0", "transformers": "5.23.0"},
    }


def _end(steps: int) -> LogRow:
    spent = {"gpu_hours": 3.25, "pairs": 64 * steps, "tokens": 8_200_000, "flops": 4.1e17, "hardware_flops": 5.5e17}
    compare = {"name": "SigLIP pre-training", "flops": 1 / 2000, "samples": 0.25}
    return {"event": "end", "step": steps, **spent, "compare": compare}


def _step(step: int, steps: int, objective: str, random: np.random.Generator) -> LogRow:
    done, noise = step / steps, random.normal(size=8)
    row: dict[str, Any] = {"step": step, "loss": 0.693 * math.exp(-2 * done) + 0.05 + 0.04 * noise[0]}
    row["logps/chosen"] = -2 + done + 0.2 * noise[1]
    if objective == "dpo":
        row |= {"rewards/chosen": 0.4 * done + 0.05 * noise[2], "rewards/rejected": -1.5 * done + 0.1 * noise[3]}
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
        row["rewards/accuracies"] = min(1.0, 0.5 + 0.4 * (1 - math.exp(-5 * done)) + 0.04 * noise[4])
        row["logps/rejected"] = -3 - 9 * done + 0.4 * noise[5]
    for index, name in enumerate(COMPONENTS):
        row[f"lr/{name}"] = 1e-4 / (1 + 4 * (index == 0)) * 0.5 * (1 + math.cos(math.pi * done))
        row[f"grad_norm/{name}"] = (0.3 + index) * math.exp(-done + 0.3 * noise[6])
        row[f"update_ratio/{name}"] = 1e-4 * (index + 1) * (1.02 - done) * math.exp(0.2 * noise[7])
    row |= {"grad_norm": 2 * math.exp(-done + 0.3 * noise[6]), "masked": 0, "perf/pairs_per_s": 92 + 4 * noise[0]}
    return row | {"perf/tokens_per_s": 11800 + 300 * noise[1], "perf/peak_memory_gib": 1.4}


def _outcomes(share: float, count: int) -> Outcomes:
    random = np.random.default_rng(9)  # the same difficulties at every step: paired
    rows, groups = np.arange(count), np.arange(count, dtype=np.uint64) // np.uint64(4)
    outcomes: Outcomes = {}
    for name, level in ((PREFERENCE, 0.5 + 0.48 * share), (VQA, share)):
        outcomes |= {name: (random.random(count) < level).astype(float), f"{name}/row": rows, f"{name}/group": groups}
    return outcomes


def _evaluation(step: int, steps: int, objective: str, outcomes: Outcomes) -> LogRow:
    row: LogRow = {"event": "eval", "step": step, "skipped": {}, "seconds": 4.2}
    row |= {"eval/num_samples": len(outcomes[PREFERENCE]), "eval/num_questions": len(outcomes[VQA])}
    row["eval/loss"] = 0.6931 * math.exp(-1.5 * step / steps)
    row |= {name: float(outcomes[name].mean()) for name in (PREFERENCE, VQA)}
    row["intervals"] = {name: intervals.share(outcomes[name], outcomes[f"{name}/group"]) for name in (PREFERENCE, VQA)}
    row |= {f"{VQA}_blind": 0.34, f"{VQA}/colour": row[VQA], f"{VQA}/shape": 0.9 * row[VQA]}
    if objective == "dpo":
        margin = 1.9 * step / steps
        row |= {"eval/rewards/chosen": 0.3 * margin, "eval/rewards/rejected": -0.7 * margin}
        row |= {"eval/rewards/margins": margin, REWARDS: 0.88 if step else 0.0}
        row["intervals"][REWARDS] = (0.88, 0.853, 0.904) if step else (0.0, 0.0, 0.01)
    return row


def _answer(question: SampleAnswer, share: float, index: int) -> SampleAnswer:
    """Right for as many of the questions as `share` says; a question once right stays so."""
    right = (0.618 * (index + 1)) % 1 < share
    generated = question.answer if right else question.generated
    known = None if question.right is None else right
    return SampleAnswer(question.row, question.id, question.question, question.answer, generated, known)
