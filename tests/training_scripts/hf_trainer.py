"""Transformers' ``Trainer`` on a tiny GPT-2, with ``max_grad_norm`` and accumulated gradients."""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.manual_seed(options.seed)
config = GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
rows = [{"input_ids": (ids := torch.randint(0, 50, (8,))), "labels": ids} for _ in range(64)]
model = GPT2LMHeadModel(config)
with tempfile.TemporaryDirectory() as output:
    arguments = TrainingArguments(
        output_dir=output,
        seed=options.seed,
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
torch.save({"weights": model.state_dict(), "updates": trainer.state.global_step}, options.out)
