# A small character-level GPT that learns to write Shakespeare. First: python prepare/shakespeare_char.py
#
#   python train.py configs/train_shakespeare_char.py
#
# One GPU, about 3 minutes on an A100, val loss 1.47 (nanoGPT's figures for this configuration).

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, because it will overfit
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # keep the best: it will overfit

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks take a higher one
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # a bit longer memory, because an iteration has few tokens
warmup_iters = 100
