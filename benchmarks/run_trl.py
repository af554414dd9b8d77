"""TRL's side of `dpo_step.py`: its DPOTrainer as its users run it, the steps timed. JSON in, JSON out.

python benchmarks/run_trl.py '{"case": ..., "steps": ..., ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

import torch
from datasets import Dataset, Features, Image, Sequence, Value
from measure import Clock, Memory
from torch.utils.data import SequentialSampler
from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainerCallback
from trl import DPOConfig, DPOTrainer


class InOrder(DPOTrainer):
    """The pairs in the order that they are given: our plan's."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Watch(TrainerCallback):
    def __init__(self, device: str) -> None:
        self.clock = Clock(device)
        self.losses: list[float] = []
        self.margins: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.margins.append(float(logs["rewards/margins"]))


def read_pairs(case: Path, ids: list[int]) -> Dataset:
    rows = json.loads((case / "rows.json").read_text())
    columns: dict[str, list[Any]] = {"images": [], "prompt": [], "chosen": [], "rejected": []}
    for number in ids:
        row = rows[number]
        columns["images"].append([{"bytes": (case / row["image"]).read_bytes(), "path": None}])
        columns["prompt"].append([{"role": "user", "content": row["prompt"]}])
        for name in ("chosen", "rejected"):
            columns[name].append([{"role": "assistant", "content": row[name]}])
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": Sequence(Image()), "prompt": message, "chosen": message, "rejected": message})
    return Dataset.from_dict(columns, features=features)


def main() -> None:
    task = json.loads(sys.argv[1])
    memory = Memory(task["device"])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    case, dtype = Path(task["case"]), {"fp32": torch.float32, "bf16": torch.bfloat16}[task["dtype"]]
    load = {"dtype": dtype, "attn_implementation": task["attention"]}
    model = LlavaForConditionalGeneration.from_pretrained(case / "model", **load)
    processor = AutoProcessor.from_pretrained(case / "model")
    processor.tokenizer.padding_side = "left"
    arguments = DPOConfig(
        output_dir=str(case / task["name"]),
        per_device_train_batch_size=task["batch"],
        gradient_accumulation_steps=task["pairs_per_step"] // task["batch"],
        max_steps=task["steps"],
        learning_rate=task["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        max_length=None,
        bf16=task["dtype"] == "bf16",
        use_cpu=task["device"] == "cpu",
        gradient_checkpointing=task["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if task["checkpointing"] else None,
        dataloader_num_workers=task["workers"],
        dataloader_pin_memory=task["device"] == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    watch = Watch(task["device"])
    ids = [number for step in task["ids"] for number in step]
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=read_pairs(case, ids),
        processing_class=processor,
        callbacks=[watch],
    )
    trainer.train()
    result = {
        "seconds": watch.clock.seconds,
        "cpu_seconds": watch.clock.cpu_seconds,
        "losses": watch.losses,
        "margins": watch.margins,
        "peak_memory_gib": memory.peak_gib(),
    }
    Path(task["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
