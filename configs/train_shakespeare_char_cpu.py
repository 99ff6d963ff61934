# The small Shakespeare GPT, smaller still: for a laptop. First: python prepare/shakespeare_char.py
#
#   python train.py configs/train_shakespeare_char_cpu.py
#
# 2 CPU cores, about 2 minutes, val loss 1.89. It is nanoGPT's CPU recipe (its README: 3 minutes, 1.88).

out_dir = "out-shakespeare-char-cpu"
eval_interval = 250
eval_iters = 20  # noisier, but soon done
log_interval = 10
always_save_checkpoint = False

dataset = "shakespeare_char"
device = "cpu"
compile = False
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
