# Finetune GPT-2 XL on Shakespeare. First: python prepare/shakespeare.py
#
#   python train.py configs/finetune_shakespeare.py
#
# One GPU with 40 GB, a few minutes (nanoGPT's figure; it gives no loss, and none was measured here). With less memory,
# start from a smaller model: --init_from=gpt2-large | gpt2-medium | gpt2.

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_project = "shakespeare"
wandb_run_name = "finetune"

dataset = "shakespeare"
init_from = "gpt2-xl"
always_save_checkpoint = False

# 1 sequence * 32 micro-batches * 1024 tokens = 32,768 tokens an iteration; an epoch of 301,966 tokens is 9 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
