# GPT-2 (124M) from scratch on OpenWebText. First: python prepare/openwebtext.py
#
#   torchrun --standalone --nproc_per_node=8 train.py configs/train_gpt2.py
#
# 8 A100 40GB, about 4 days, val loss about 2.85 (nanoGPT's figures for this configuration).

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences * 1024 tokens * 40 micro-batches over all GPUs = 491,520 tokens an iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 iterations are 295 billion tokens, 33 times through OpenWebText
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
