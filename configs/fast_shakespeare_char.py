# The model and data of train_shakespeare_char.py, learning faster: rotary positions, normalised queries and keys,
# squared ReLU, Muon, and a rate that falls along a line. First: python prepare/shakespeare_char.py
#
#   python train.py configs/fast_shakespeare_char.py
#
# One GPU. With --max_iters=500 --short_conv=2: 69 seconds on an H200, val loss 1.44 (commit d943a9b, one run). As it
# stands below, not measured.

out_dir = "out-fast-shakespeare-char"
eval_interval = 100
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
position = "rope"
qk_norm = True
mlp = "relu2"

optimizer = "muon"
muon_lr = 0.02
learning_rate = 0.01
weight_decay = 0.1
schedule = "wsd"
decay_fraction = 0.5
max_iters = 1000
warmup_iters = 10
min_lr = 0.0
