# The model and data of train_shakespeare_char.py, learning faster: rotary positions, normalised queries and keys,
# squared ReLU, Muon, and a rate that falls along a line. First: python prepare/shakespeare_char.py
#
#   python train.py configs/fast_shakespeare_char.py
#
# One H200: after 350 iterations, 16 seconds from the command, the val loss is below the 1.4697 that nanoGPT publishes
# for train_shakespeare_char.py after 5,000. Its recipe takes 43 seconds to it on the same machine (docs/speed.md).

out_dir = "out-fast-shakespeare-char"
eval_interval = 50
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
short_conv = 2

optimizer = "muon"
muon_lr = 0.02
learning_rate = 0.01
weight_decay = 1.0
schedule = "wsd"
decay_fraction = 1.0
max_iters = 450
warmup_iters = 10
min_lr = 0.0
